"""Every model of keras.applications, whole, untrained, at the smallest size of image it takes.

Importing this module enters them into `entry.ENTRIES`.
"""

from __future__ import annotations

import functools

import keras
import numpy as np
from keras import layers
from models import Floats

from zoo.entry import Pixels, enter

# A family's members, the one of the fewest weights first.
FAMILIES = {
    "ConvNeXt": [
        "ConvNeXtTiny",
        "ConvNeXtSmall",
        "ConvNeXtBase",
        "ConvNeXtLarge",
        "ConvNeXtXLarge",
    ],
    "DenseNet": ["DenseNet121", "DenseNet169", "DenseNet201"],
    "EfficientNet": [f"EfficientNetB{n}" for n in range(8)],
    "EfficientNetV2": [f"EfficientNetV2{n}" for n in ("B0", "B1", "B2", "B3", "S", "M", "L")],
    "InceptionResNetV2": ["InceptionResNetV2"],
    "InceptionV3": ["InceptionV3"],
    "MobileNet": ["MobileNet"],
    "MobileNetV2": ["MobileNetV2"],
    "MobileNetV3": ["MobileNetV3Small", "MobileNetV3Large"],
    "NASNet": ["NASNetMobile", "NASNetLarge"],
    "ResNet": ["ResNet50", "ResNet101", "ResNet152"],
    "ResNetV2": ["ResNet50V2", "ResNet101V2", "ResNet152V2"],
    "VGG": ["VGG16", "VGG19"],
    "Xception": ["Xception"],
}
SMALLEST = frozenset(members[0] for members in FAMILIES.values())
SIDE = {"InceptionResNetV2": 75, "InceptionV3": 75, "Xception": 71}  # 32 for the others
RESCALING = ("ConvNeXt", "EfficientNet", "EfficientNetV2", "MobileNetV3")


def build(name: str, side: int) -> keras.Model:
    make = getattr(keras.applications, name)
    return make(input_shape=(side, side, 3), weights=None, classes=10)


def settle(model: keras.Model, example: Floats | Pixels) -> None:
    """Give each batch normalisation the statistics of data.

    With statistics that have nothing to do with the data a hundred layers blow the signal up,
    until the sigmoids and the softmax are flat and every gradient is zero.
    """
    norms = [n for n in model.layers if isinstance(n, layers.BatchNormalization)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    if norms:
        model(example.draw(np.random.default_rng(2), 16, model.dtype), training=True)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


for family, members in FAMILIES.items():
    for member in members:
        side = SIDE.get(member, 32)
        example = (Pixels if family in RESCALING else Floats)((side, side, 3))
        enter(
            "applications",
            member,
            functools.partial(build, member, side),
            example,
            finish=functools.partial(settle, example=example),
            outputs=(3,),
            slow=True,
        )
