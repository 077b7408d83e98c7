"""What stands before and between the layers that learn: preprocessing, spectra, pooling.

Importing this module enters its models into `entry.ENTRIES`.
"""

from __future__ import annotations

import keras
import numpy as np
from keras import layers
from models import Floats, Ids

from zoo.stacks import enter_table

SEQUENCE = Floats((4, 3))


def adapted(**options):
    def function(x):
        normalization = layers.Normalization(**options)
        normalization.adapt(np.random.default_rng(2).normal(2.0, 3.0, (50, 4, 3)))
        return layers.Dense(3)(normalization(x))

    return function


def statistics_given(x):
    return layers.Dense(3)(layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[1.0, 2.0, 3.0])(x))


def in_front(*front):
    """Return these layers, new each time, and a convolution or a dense layer behind them."""

    def function(x):
        for make in front:
            x = make()(x)
        return layers.Conv2D(2, 2)(x) if len(x.shape) == 4 else layers.Dense(3)(x)

    return function


def at_rest(x):
    """Layers that do nothing at inference, before and behind a weight."""
    x = layers.GaussianNoise(0.5)(layers.Dropout(0.5)(x))
    x = layers.Dense(4, activation="relu")(x)
    x = layers.GaussianDropout(0.5)(layers.AlphaDropout(0.5)(x))
    return layers.SpatialDropout1D(0.5)(layers.ActivityRegularization(0.1)(x))


def crossed(left, right):
    return layers.Embedding(5, 3)(layers.HashedCrossing(5)((left, right)))


PREPROCESSED = {
    "rescaling in front": in_front(lambda: layers.Rescaling(0.5, offset=0.1)),
    "rescaling of each channel": in_front(lambda: layers.Rescaling([0.1, 0.2, 0.3], [1, 2, 3])),
    "random flip in front": in_front(lambda: layers.RandomFlip()),
    "augmentation in front": in_front(
        lambda: layers.RandomRotation(0.1),
        lambda: layers.RandomTranslation(0.1, 0.1),
        lambda: layers.RandomZoom(0.1),
        lambda: layers.RandomContrast(0.1),
        lambda: layers.RandomBrightness(0.1),
    ),
    "center crop in front": in_front(lambda: layers.CenterCrop(4, 4)),
    "resizing in front": in_front(lambda: layers.Resizing(4, 3)),
    "pipeline in front": in_front(
        lambda: layers.Pipeline([layers.Rescaling(0.5), layers.Conv2D(3, 1)])
    ),
}
enter_table(
    {
        Floats((6, 5, 3)): PREPROCESSED,
        SEQUENCE: {
            "normalization adapted": adapted(),
            "normalization adapted without axis": adapted(axis=None),
            "normalization inverted": adapted(invert=True),
            "normalization statistics given": statistics_given,
            "at rest": at_rest,
            "discretization into embedding": lambda x: layers.Embedding(4, 3)(
                layers.Discretization([-0.5, 0.0, 0.7])(x)
            ),
            "discretization one_hot": in_front(
                lambda: layers.Reshape((12,)),
                lambda: layers.Discretization([-0.5, 0.0, 0.7], output_mode="multi_hot"),
            ),
        },
        Ids((4,), below=6): {
            "categoryencoding multi_hot": in_front(
                lambda: layers.CategoryEncoding(6, output_mode="multi_hot")
            ),
            "categoryencoding count": in_front(
                lambda: layers.CategoryEncoding(6, output_mode="count")
            ),
            "categoryencoding one_hot": in_front(
                lambda: layers.Reshape((4, 1)),
                lambda: layers.CategoryEncoding(6, output_mode="one_hot"),
            ),
            "hashing into embedding": lambda ids: layers.Embedding(5, 3)(layers.Hashing(5)(ids)),
            "integerlookup into embedding": lambda ids: layers.Embedding(5, 3)(
                layers.IntegerLookup(vocabulary=[1, 3, 4])(ids)
            ),
            "integerlookup tf_idf": in_front(
                lambda: layers.IntegerLookup(
                    vocabulary=[1, 3, 4], idf_weights=[0.2, 0.5, 0.8], output_mode="tf_idf"
                )
            ),
        },
        (Ids((1,), below=4), Ids((1,), below=4)): {"hashedcrossing into embedding": crossed},
    }
)


def spectrogram(**options):
    return lambda x: layers.STFTSpectrogram(frame_length=6, frame_step=3, fft_length=8, **options)(
        x
    )


WAVE = Floats((18, 2))
MODES = ("log", "magnitude", "psd", "real", "imag", "angle", "stft")
enter_table(
    {
        WAVE: {
            **{f"stftspectrogram {mode}": spectrogram(mode=mode) for mode in MODES},
            "stftspectrogram same": spectrogram(padding="same", window="hamming"),
            "stftspectrogram expanded": spectrogram(expand_dims=True, scaling=None),
        },
    }
)

# In float64 Keras's own fails. Decibels it counts from the loudest example of the batch.
enter_table(
    {
        Floats((24,)): {
            "melspectrogram": lambda x: layers.MelSpectrogram(
                fft_length=8,
                sequence_stride=4,
                num_mel_bins=3,
                sampling_rate=64,
                min_freq=2.0,
                power_to_db=False,
            )(layers.Dense(24)(x)),
        },
    },
    dtypes=("float32",),
)

# A layer without weights has one on each side.
BETWEEN_1D = {
    "averagepooling1d": lambda: layers.AveragePooling1D(2, padding="same"),
    "maxpooling1d": lambda: layers.MaxPooling1D(2),
    "globalaveragepooling1d": lambda: layers.GlobalAveragePooling1D(),
    "globalmaxpooling1d": lambda: layers.GlobalMaxPooling1D(keepdims=True),
    "adaptiveaveragepooling1d": lambda: layers.AdaptiveAveragePooling1D(2),
    "upsampling1d": lambda: layers.UpSampling1D(2),
    "zeropadding1d": lambda: layers.ZeroPadding1D((1, 2)),
    "cropping1d": lambda: layers.Cropping1D((1, 0)),
    "permute": lambda: layers.Permute((2, 1)),
    "reshape": lambda: layers.Reshape((-1, 2)),
    "flatten and repeatvector": lambda: keras.Sequential(
        [layers.Flatten(), layers.RepeatVector(3)]
    ),
    "softmax over time": lambda: layers.Softmax(axis=1),
    "lambda": lambda: layers.Lambda(lambda x: x**2),
}
BETWEEN_2D = {
    "averagepooling2d": lambda: layers.AveragePooling2D(2, strides=1, padding="same"),
    "maxpooling2d": lambda: layers.MaxPooling2D(2, padding="same"),
    "globalaveragepooling2d": lambda: layers.GlobalAveragePooling2D(keepdims=True),
    "globalmaxpooling2d": lambda: layers.GlobalMaxPooling2D(),
    "adaptiveaveragepooling2d": lambda: layers.AdaptiveAveragePooling2D((2, 3)),
    "adaptivemaxpooling2d": lambda: layers.AdaptiveMaxPooling2D((2, 3)),
    "upsampling2d bilinear": lambda: layers.UpSampling2D(2, interpolation="bilinear"),
    "upsampling2d nearest": lambda: layers.UpSampling2D((1, 2)),
    "zeropadding2d": lambda: layers.ZeroPadding2D(1),
    "cropping2d": lambda: layers.Cropping2D(1),
    "resizing": lambda: layers.Resizing(3, 3),
}


def between(make):
    def function(x):
        if len(x.shape) == 4:
            return layers.Dense(2)(make()(layers.Conv2D(4, 2, activation="tanh")(x)))
        return layers.Dense(2)(make()(layers.Dense(4, activation="tanh")(x)))

    return function


enter_table(
    {
        Floats((5, 3)): {f"{name} between": between(make) for name, make in BETWEEN_1D.items()},
        Floats((6, 5, 3)): {f"{name} between": between(make) for name, make in BETWEEN_2D.items()},
    }
)
