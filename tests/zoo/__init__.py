"""The zoo: many models, and a test that perjac's Jacobians agree with the oracle on all of them.

An entry is a model at a float type and two examples for it. Nothing but the test knows perjac.
"""
