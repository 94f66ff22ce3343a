"""How many batch normalizations fold in public collections of Keras models.

One model of most families, at a small input, with random weights and statistics. Only
what is installed is counted: `pip install --no-deps` is enough for most packages.

python tests/tools/fold_share.py [COLLECTION ...]
"""

import argparse
import collections
import importlib
import re
import sys
import warnings

from applications import randomize

_LARGER = "InceptionV3 Xception"
_IMAGE = {"input_shape": (64, 64, 3), "weights": None}
_96 = {"input_shape": (96, 96, 3), "weights": None}
_KECAM = {"pretrained": None, "num_classes": 10}
_UNET = [(64, 64, 3), [8, 16, 32, 64], 2]
_RESNET = {"encoder_weights": None, "classes": 2}

# Collection -> the module, the names in it, and the arguments and options of a call.
COLLECTIONS = {
    "kimm": [
        (
            "kimm.models",
            "ConvMixer736D32 DenseNet121 EfficientNetB0 EfficientNetLiteB0 TinyNetE "
            "EfficientNetV2B0 GhostNetW050 GhostNetV2W100 GhostNetV3W050 HGNetTiny "
            "HGNetV2B0 InceptionNeXtTiny LCNet035 MobileNetV2W050 MobileNetV3W050Small "
            "MobileOneS0 MobileViTXXS MobileViTV2W050 RegNetX002 RegNetY002 RepVGGA0 "
            "ResNet18 ResNet50",
            [],
            _IMAGE,
        ),
        ("kimm.models", _LARGER, [], _96),
    ],
    "keras_cv_attention_models": [
        (
            "keras_cv_attention_models.models",
            "CSPNeXtTiny CotNet50 EfficientNetEdgeTPUSmall EfficientNetV1B0 "
            "EfficientNetV2B0 FBNetV3B FasterNetT0 GhostNetV2_100 GhostNet_050 "
            "InceptionNeXtTiny LCNet050 MobileNetV3Small050 RegNetY040 RegNetZB16 "
            "RepViT_M09 ResNeXt50 ResNest50 ResNet50D ResNet51Q TinyNetE",
            [],
            {"input_shape": (64, 64, 3), **_KECAM},
        ),
        (
            "keras_cv_attention_models.models",
            "BotNetSE33T BotNextECA26T FastViT_T8",
            [],
            {"input_shape": (128, 128, 3), **_KECAM},
        ),
        (
            "keras_cv_attention_models.models",
            "EfficientViT_B0 IFormerSmall",
            [],
            {"input_shape": (224, 224, 3), **_KECAM},
        ),
    ],
    "keras_vision": [
        (
            "keras_vision.fastvit",
            "fastvit_t8 fastvit_sa12",
            [],
            {"input_shape": (64, 64, 3)},
        ),
        (
            "keras_vision.MobileViT_v1",
            "build_MobileViT_v1",
            ["XXS"],
            {"input_shape": (64, 64, 3)},
        ),
        (
            "keras_vision.MobileViT_v2",
            "build_MobileViT_v2",
            [0.5],
            {"input_shape": (64, 64, 3)},
        ),
    ],
    "kyolo": [
        (
            "kyolo",
            "yolov5n yolov8n yolov9t yolov9c yolov10n yolo11n yolo12n yolo26n",
            [],
            {"nc": 3, "input_shape": (64, 64, 3)},
        )
    ],
    "medicai": [
        (
            "medicai.models",
            "ResNet18 ResNet50vd ResNet50v2 ResNeXt50 SEResNet18 DenseNet121 "
            "EfficientNetB0 EfficientNetV2B0",
            [],
            {"input_shape": (64, 64, 3), "num_classes": 3},
        ),
        ("medicai.models", "Xception", [], {"input_shape": (96, 96, 3)}),
        (
            "medicai.models",
            "UNet AttentionUNet UNetPlusPlus DeepLabV3Plus UPerNet",
            [],
            {"encoder_name": "resnet18", "input_shape": (64, 64, 3)},
        ),
        (
            "medicai.models",
            "UNet",
            [],
            {"encoder_name": "resnet18", "input_shape": (32, 32, 32, 1)},
        ),
    ],
    "segmodels_keras": [
        (
            "segmodels_keras",
            "Unet FPN Linknet",
            ["resnet18"],
            {"input_shape": (64, 64, 3), **_RESNET},
        ),
        (
            "segmodels_keras",
            "PSPNet",
            ["resnet18"],
            {"input_shape": (96, 96, 3), **_RESNET},
        ),
        (
            "segmodels_keras",
            "Unet",
            ["mobilenetv2"],
            {"input_shape": (64, 64, 3), **_RESNET},
        ),
        (
            "segmodels_keras",
            "FPN",
            ["efficientnetb0"],
            {"input_shape": (64, 64, 3), **_RESNET},
        ),
    ],
    "segmentation_models_3D": [
        (
            "segmentation_models_3D",
            "Unet FPN Linknet",
            ["resnet18"],
            {"input_shape": (32, 32, 32, 3), **_RESNET},
        ),
        (
            "segmentation_models_3D",
            "PSPNet",
            ["resnet18"],
            {"input_shape": (48, 48, 48, 3), **_RESNET},
        ),
    ],
    "keras_unet_collection": [
        (
            "keras_unet_collection.models",
            "unet_2d unet_plus_2d r2_unet_2d att_unet_2d",
            _UNET,
            {"batch_norm": True},
        ),
        (
            "keras_unet_collection.models",
            "u2net_2d",
            [(64, 64, 3), 2, [8, 8]],
            {"batch_norm": True},
        ),
        (
            "keras_unet_collection.models",
            "unet_3plus_2d",
            [(64, 64, 3), 2, [8, 16, 32, 64]],
            {"batch_norm": True},
        ),
    ],
    "keras_climate": [
        ("keras_climate.remote_sensing.unet", "UNet", [(64, 64, 3), 2, 8], {}),
        (
            "keras_climate.remote_sensing.deeplabv3plus",
            "DeepLabV3Plus",
            [],
            {"input_shape": (64, 64, 3)},
        ),
        ("keras_climate.weather.metnet", "MetNet", [], {}),
        ("keras_climate.forecasting.informer", "Informer", [], {}),
    ],
    "k3im": [("k3im.convmixer", "ConvMixer", [32, 16, 4, 3, 2, 10, 3], {})],
}
# What another `fold` could do. All else that stays has a nonlinear layer, an output or
# input of the model, a second reader or zero padding on either side.
LEFT = re.compile("cannot be opened|is an attribute|no part has a kernel")
COLUMNS = ["models", "normalizations", "folded", "impossible", "left", "folded, Δ"]


def prepare(model):
    """Random statistics and affine weights, and outputs that are not saturated."""
    import keras

    randomize(model)
    for layer in model._flatten_layers():
        if getattr(layer, "activation", None) is keras.activations.softmax:
            layer.activation = keras.activations.linear


def count(model):
    """A value for each of `COLUMNS`, and the reasons of what stays in a model.

    The difference is the largest of the outputs, relative to the largest output.
    """
    import keras
    import numpy as np

    import keras_bn
    from keras_bn.tools.compare import random_inputs

    prepare(model)
    plan, folded = keras_bn.plan_fold(model), keras_bn.fold(model)
    x = random_inputs(model, 2)
    before, after = (
        map(keras.ops.convert_to_numpy, keras.tree.flatten(m(x, training=False)))
        for m in (model, folded)
    )
    off = max(
        float(np.abs(a - b).max() / (np.abs(a).max() or 1))
        for a, b in zip(before, after, strict=True)
    )
    reasons = [fold.reason for fold in plan if fold.into is None]
    left = sum(bool(LEFT.search(reason)) for reason in reasons)
    folds = len(plan) - len(reasons)
    return [1, len(plan), folds, len(reasons) - left, left, off], reasons


def _models(name):
    for module, names, arguments, options in COLLECTIONS[name]:
        for each in names.split():
            function = getattr(importlib.import_module(module), each)
            yield each, lambda f=function, a=arguments, o=options: f(*a, **o)


def _without_names(reason):
    return re.sub("'[^']*'( and '[^']*')*", "…", reason)


def _as_keras_core():
    """`keras_cv_attention_models` takes Keras 3 by its old name."""
    import os

    os.environ["KECAM_BACKEND"] = "keras_core"
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "keras":
            sys.modules["keras_core" + name.removeprefix("keras")] = module


def main():
    import keras

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="COLLECTION")
    names = parser.parse_args().names or COLLECTIONS
    warnings.simplefilter("ignore")
    _as_keras_core()
    whole, all_reasons = [0] * (len(COLUMNS) - 1), collections.Counter()
    print(f"| collection | {' | '.join(COLUMNS)} |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for name in names:
        rows = []
        try:
            for model, make in _models(name):
                keras.utils.clear_session()
                keras.utils.set_random_seed(0)
                row, reasons = count(make())
                print(name, model, *row, file=sys.stderr, flush=True)
                rows.append(row)
                all_reasons.update(map(_without_names, reasons))
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        *sums, off = zip(*rows, strict=True)
        sums, off = list(map(sum, sums)), max(off)
        whole = [a + b for a, b in zip(whole, sums, strict=True)]
        cells = map(str, [name, *sums, f"{off:.0e}"])
        print(f"| {' | '.join(cells)} |", flush=True)
    print(f"| all | {' | '.join(map(str, whole))} | |")
    for reason, number in all_reasons.most_common():
        print(number, reason, file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
