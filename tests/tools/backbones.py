"""Backbones of KerasHub with batch normalization: converted, folded, frozen and saved.

Each is of a class that makes its own layers, here small and with random weights.

python tests/tools/backbones.py [NAME ...] [--subset]
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

from applications import randomize

_RESNET = {
    "input_conv_filters": [64],
    "input_conv_kernel_sizes": [7],
    "stackwise_num_filters": [64, 64, 64, 64],
    "stackwise_num_blocks": [1, 1, 1, 1],
    "stackwise_num_strides": [1, 2, 2, 2],
    "block_type": "bottleneck_block",
}
_CSP = {
    "stem_filters": 8,
    "stem_kernel_size": 3,
    "stem_strides": 1,
    "stackwise_depth": [1, 1, 1],
    "stackwise_strides": [1, 2, 2],
    "stackwise_num_filters": [8, 16, 16],
}
_EFFICIENT = {
    "stackwise_kernel_sizes": [3, 3],
    "stackwise_num_repeats": [1, 2],
    "stackwise_input_filters": [8, 8],
    "stackwise_output_filters": [8, 16],
    "stackwise_expansion_ratios": [1, 4],
    "stackwise_squeeze_and_excite_ratios": [0.0, 0.25],
    "stackwise_strides": [1, 2],
    "stackwise_block_types": ["fused", "unfused"],
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
}
_HGNET = {
    "depths": [1, 1, 1],
    "embedding_size": 8,
    "hidden_sizes": [16, 16, 16],
    "stem_channels": [3, 8, 8],
    "hidden_act": "relu",
    "use_learnable_affine_block": False,
    "stackwise_stage_filters": [
        (8, 8, 16, 1, 1, 3),
        (16, 8, 16, 1, 1, 3),
        (16, 8, 16, 1, 1, 3),
    ],
    "apply_downsample": [False, True, True],
    "use_lightweight_conv_block": [False, False, False],
}
_MOBILE = {
    "stackwise_expansion": [[16, 16], [24]],
    "stackwise_num_blocks": [2, 1],
    "stackwise_num_filters": [[8, 8], [16]],
    "stackwise_kernel_size": [[3, 3], [5]],
    "stackwise_num_strides": [[2, 1], [2]],
    "stackwise_se_ratio": [[None, None], [0.25]],
    "stackwise_activation": [["relu", "relu"], ["hard_swish"]],
    "stackwise_padding": [[1, 1], [2]],
    "output_num_filters": 32,
    "input_activation": "hard_swish",
    "output_activation": "hard_swish",
    "input_num_filters": 8,
    "depthwise_filters": 8,
    "depthwise_stride": 2,
    "depthwise_residual": False,
    "last_layer_filter": 32,
}
# With batch normalization, where that is an option of the backbone.
_MOBILE_V5 = {
    "stackwise_block_types": [["er"], ["uir", "uir"]],
    "stackwise_num_blocks": [1, 2],
    "stackwise_num_filters": [[8], [16, 16]],
    "stackwise_strides": [[2], [2, 1]],
    "stackwise_act_layers": [["relu"], ["relu", "relu"]],
    "stackwise_exp_ratios": [[4.0], [4.0, 4.0]],
    "stackwise_se_ratios": [[0.0], [0.0, 0.0]],
    "stackwise_dw_kernel_sizes": [[0], [5, 5]],
    "stackwise_dw_start_kernel_sizes": [[0], [0, 0]],
    "stackwise_dw_end_kernel_sizes": [[0], [0, 0]],
    "stackwise_exp_kernel_sizes": [[3], [0, 0]],
    "stackwise_pw_kernel_sizes": [[1], [0, 0]],
    "stackwise_num_heads": [[0], [0, 0]],
    "stackwise_key_dims": [[0], [0, 0]],
    "stackwise_value_dims": [[0], [0, 0]],
    "stackwise_kv_strides": [[0], [0, 0]],
    "stackwise_use_cpe": [[False], [False, False]],
    "stem_size": 8,
    "use_msfa": False,
    "norm_layer": "batch_norm",
    # KerasHub makes a lambda of "gelu", and no file of such an activation loads.
    "act_layer": "relu",
}
_MIT = {
    "layerwise_depths": [1, 1],
    "hidden_dims": [4, 8],
    "num_layers": 2,
    "layerwise_num_heads": [1, 2],
    "layerwise_sr_ratios": [8, 4],
    "max_drop_path_rate": 0.1,
    "layerwise_patch_sizes": [7, 3],
    "layerwise_strides": [4, 2],
}
_D_FINE = {
    "decoder_in_channels": [16, 16],
    "encoder_hidden_dim": 16,
    "num_denoising": 10,
    "num_labels": 4,
    "hidden_dim": 16,
    "learn_initial_query": False,
    "num_queries": 10,
    "anchor_image_size": (32, 32),
    "feat_strides": [4, 8],
    "num_feature_levels": 2,
    "encoder_in_channels": [16, 32],
    "encode_proj_layers": [1],
    "num_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "num_encoder_layers": 1,
    "hidden_expansion": 0.5,
    "depth_multiplier": 0.5,
    "eval_idx": -1,
    "num_decoder_layers": 3,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "decoder_n_points": [2, 2],
    "lqe_hidden_dim": 16,
    "num_lqe_layers": 2,
    "out_features": ["stage1", "stage2"],
    "seed": 0,
}


def _basnet(hub, shape):
    encoder = hub.models.ResNetBackbone(**{**_RESNET, "input_conv_filters": [4]})
    return hub.models.BASNetBackbone(
        image_encoder=encoder, num_classes=1, projection_filters=4, image_shape=shape
    )


def _d_fine(hub, shape):
    encoder = hub.models.HGNetV2Backbone(
        stem_channels=[3, 8, 8],
        stackwise_stage_filters=[[8, 8, 16, 1, 1, 3], [16, 8, 32, 1, 1, 3]],
        apply_downsample=[False, True],
        use_lightweight_conv_block=[False, False],
        depths=[1, 1],
        hidden_sizes=[16, 32],
        embedding_size=8,
        use_learnable_affine_block=True,
        hidden_act="relu",
        image_shape=(None, None, 3),
        out_features=["stage1", "stage2"],
    )
    return hub.models.DFineBackbone(backbone=encoder, **_D_FINE, image_shape=shape)


def _segformer(hub, shape):
    encoder = hub.models.MiTBackbone(**_MIT, image_shape=shape)
    return hub.models.SegFormerBackbone(image_encoder=encoder, projection_filters=8)


def _retinanet(hub, shape):
    return hub.models.RetinaNetBackbone(
        image_encoder=hub.models.ResNetBackbone(**_RESNET, image_shape=shape),
        min_level=3,
        max_level=5,
        use_p5=True,
        use_fpn_batch_norm=True,
        image_shape=shape,
    )


def _of(name, **options):
    return lambda hub, shape: getattr(hub.models, f"{name}Backbone")(
        **options, image_shape=shape
    )


def _deeplab(hub, shape):
    encoder = hub.models.ResNetBackbone(
        **_RESNET, use_pre_activation=False, image_shape=shape
    )
    return hub.models.DeepLabV3Backbone(
        image_encoder=encoder,
        projection_filters=4,
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P5",
        upsampling_size=8,
        dilation_rates=[2, 3],
        image_shape=shape,
    )


BACKBONES = {
    "BASNet": _basnet,
    "CSPNet": _of("CSPNet", **_CSP, stage_type="dark", block_type="dark_block"),
    "D-FINE": _d_fine,
    "DeepLabV3": _deeplab,
    "DenseNet": _of("DenseNet", stackwise_num_repeats=[2, 2], growth_rate=8),
    "EfficientNet": _of("EfficientNet", **_EFFICIENT),
    "HGNetV2": _of("HGNetV2", **_HGNET),
    "MobileNet": _of("MobileNet", **_MOBILE),
    "MobileNetV5": _of("MobileNetV5", **_MOBILE_V5),
    "ResNet": _of("ResNet", **_RESNET, use_pre_activation=False),
    "ResNet V2": _of("ResNet", **_RESNET, use_pre_activation=True),
    "RetinaNet": _retinanet,
    "SegFormer": _segformer,
    "Xception": _of(
        "Xception",
        stackwise_conv_filters=[[8, 8], [16, 16], [16, 16]],
        stackwise_pooling=[True, True, False],
    ),
}
# No file that names the layers of these loads: one takes no arguments of `Layer`, of
# another the config has tensors in it. So what is folded cannot be loaded.
UNREADABLE = ("D-FINE", "SegFormer")
# The largest difference that is a rounding. D-FINE takes the boxes with the highest
# scores, which are nearly equal here: a rounding decides which.
NEAR = {"D-FINE": 5.0}
# What continuous integration runs.
SUBSET = ("ResNet", "EfficientNet")
COLUMNS = {
    "norms": "normalizations",
    "convert": "converted, Δ",
    "folded": "folded",
    "fold": "folded, Δ",
    "loaded_fold": "folded, saved and loaded, Δ",
    "frozen": "frozen, saved and loaded",
    "loaded": "frozen, saved and loaded, Δ",
}


def build(name, shape=(64, 64, 3)):
    """A backbone with random weights and statistics."""
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    model = BACKBONES[name](keras_hub, shape)
    randomize(model, affine=False)
    return model


def check(name):
    """Convert, fold, freeze, save and load one backbone.

    Returns:
        A dict with a figure for each of `COLUMNS`. Differences are the largest of the
        outputs, relative to their spread.
    """
    import keras

    import keras_bn
    from keras_bn.tools.compare import random_inputs, relative_difference

    def difference(other):
        outputs = [keras.tree.flatten(m(x, training=False)) for m in (model, other)]
        pairs = zip(*outputs, strict=True)
        return max(float(relative_difference(a, b)) for a, b in pairs)

    model = build(name)
    x = random_inputs(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*makes its own layers")
        ours = keras_bn.from_keras(model)
        frozen = keras_bn.freeze(ours)
    plan = keras_bn.plan_fold(ours)
    folded = keras_bn.fold(ours)
    with tempfile.TemporaryDirectory() as folder:
        ours.save(f"{folder}/frozen.keras")
        folded.save(f"{folder}/folded.keras")
        loaded = keras_bn.load_model(f"{folder}/frozen.keras")
        opened = None
        if name not in UNREADABLE:
            opened = keras.saving.load_model(f"{folder}/folded.keras")
    layers = [
        layer
        for layer in loaded._flatten_layers()
        if isinstance(layer, keras_bn.BatchNormalization)
    ]
    assert len(layers) == len(frozen)
    return {
        "norms": len(plan),
        "convert": difference(ours),
        "folded": sum(each.into is not None for each in plan),
        "fold": difference(folded),
        "loaded_fold": None if opened is None else difference(opened),
        "frozen": sum(layer.freeze_statistics for layer in layers),
        "loaded": difference(loaded),
    }


def holds(result, limit=1e-4):
    """Whether the figures of a backbone are as they should be."""
    differences = ("convert", "fold", "loaded_fold", "loaded")
    found = [result[key] for key in differences if result[key] is not None]
    near = all(value < limit for value in found)
    return near and result["frozen"] == result["norms"] > 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--subset", action="store_true", help="two, as CI runs them")
    arguments = parser.parse_args()
    names = arguments.names or (SUBSET if arguments.subset else BACKBONES)
    failed = []
    print(f"| backbone | {' | '.join(COLUMNS.values())} |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for name in names:
        result = check(name)
        cells = [
            f"{value:.0e}" if isinstance(value, float) else str(value)
            for value in ("" if v is None else v for v in result.values())
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        if not holds(result, NEAR.get(name, 1e-4)):
            failed.append(name)
    print(*failed, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    raise SystemExit(main())
