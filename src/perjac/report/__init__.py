"""Pages that people look at: the demo's report and the saliency gallery, each a single file."""
