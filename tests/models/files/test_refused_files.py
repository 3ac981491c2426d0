"""Files that are not what they should be: refused with the reason, weights by the name that the file gives them."""

import random
import re

import numpy as np
import pytest
import torch
from published_files import (
    OF_LIBRARY,
    TINY,
    UNTOLD,
    assert_weights,
    documented,
    lightning,
    made,
    spatialreasoners_names,
    srm_names,
    variant,
)

from ipr_fast import load_model


def test_what_is_not_told_is_asked_for(unet, tmp_path):
    path = lightning(tmp_path / "x.ckpt", srm_names(unet, "denoiser."))
    with pytest.raises(ValueError, match=r"x\.ckpt: cannot infer image_size, patch_size, num_head_channels"):
        load_model(path)
    with pytest.raises(ValueError, match=r"cannot infer patch_size, num_head_channels: .*\(its shapes match none\)"):
        load_model(path, config={"image_size": 16})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("sudoku", r"config must be a preset \(even_pixels, counting_polygons, mnist_sudoku\).*got 'sudoku'"),
        (3, "config must be an SRMUNetConfig, a preset's name or a dict, got int"),
        (UNTOLD | {"colour": 1, 2: 3}, r"config: \['colour', 2\] are not fields of SRMUNetConfig"),
        (UNTOLD | {"channels": torch.ones(2)}, "channels must be a positive int"),
        (UNTOLD | {"hid_dims": np.array([32, 64])}, "hid_dims must be a tuple"),
        (UNTOLD | {"image_size": "16"}, "image_size must be a positive int"),
        (UNTOLD | {"channels": 3}, r"x\.ckpt: its weights have channels 1, config says 3"),
        (UNTOLD | {"patch_size": 5}, "patch_size must divide"),
        (UNTOLD | {"num_head_channels": 48}, "num_head_channels must divide"),
        ("mnist_sudoku", r"x\.ckpt: .*weight 'denoiser\.model\.bottleneck.*has shape \(64,\), expected \(512,\)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(unet, tmp_path, config, message):
    path = lightning(tmp_path / "x.ckpt", srm_names(unet, "denoiser."))
    with pytest.raises(ValueError, match=message):
        load_model(path, config=config)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("labels", "is conditioned on labels"),
        ("no bottleneck", "has no bottleneck"),
        (
            "concat_mask",
            r"has 3 channels in and 3 out: either it takes the mask .*\(concat_mask\), or it predicts no variance",
        ),
        ("no variance", "puts out 2 channels for 1 of image; .* 3"),
        ("scale shift", "scales and shifts by its level embedding"),
        (
            "embeddings differ",
            r"weight 'denoiser\.model\.encoder.*\.t_emb\.mlp\.2\.bias' is not equal to 'denoiser\.time",
        ),
        ("embedding missing", r"is not equal to 'denoiser\.time_embedding"),
        ("uneven blocks", "the ResBlocks of its encoder, as .* are"),
        (
            "missing",
            r"no weight 'denoiser\.model\.encoder\.blocks\.1.*norm\.bias', expected shape \(32,\)",
        ),
        ("extra", r"unexpected weight 'denoiser\.model\.encoder\.blocks\.1\.0\.gate' of shape \(2, 3\)"),
        ("integers", r"norm\.bias' is of torch\.int32, expected one of float16"),
        ("sparse", r"norm\.bias' is not a dense tensor \(torch\.sparse_coo, torch\.float32, cpu\)"),
        ("meta", r"norm\.bias' is not a dense tensor \(torch\.strided, torch\.float32, meta\)"),
        ("mixed", r"its weights are of several types, .*: pass dtype="),
        ("transformer", r"weights of a transformer \(DiT\), which is not an SRMUNet; .*SpatialReasonersDenoiser\.load"),
    ],
)
def test_what_is_no_srm_unet_is_refused_with_the_reason(unet, tmp_path, kind, message):
    path = lightning(tmp_path / "x.ckpt", variant(srm_names(unet, "denoiser."), kind))
    with pytest.raises(ValueError, match=r"x\.ckpt: .*" + message):
        load_model(path, config=UNTOLD)


def test_errors_name_the_weight_as_the_file_does(unet, tmp_path):
    state = spatialreasoners_names(unet, "denoising_model.denoiser.")
    del state["denoising_model.denoiser.t_emb.mlp.2.bias"]
    for name in [name for name in state if name.endswith("norm_with_embedding.t_emb.mlp.2.bias")]:
        del state[name]
    with pytest.raises(ValueError, match=r"no weight 'denoising_model\.denoiser\.t_emb\.mlp\.2\.bias', expected shape"):
        load_model(lightning(tmp_path / "x.ckpt", state), config=OF_LIBRARY)
    state = spatialreasoners_names(unet, "denoising_model.denoiser.")
    state["denoising_model.denoiser.encoder.blocks.1.0.conv_1.0.bias"] = torch.zeros(5)
    with pytest.raises(
        ValueError, match=r"'denoising_model\.denoiser\.encoder\.blocks\.1.* has shape \(5,\), expected \(32"
    ):
        load_model(lightning(tmp_path / "x.ckpt", state), config=OF_LIBRARY)


def test_more_than_the_file_holds_is_refused(unet, tmp_path):
    state = srm_names(unet, "denoiser.")
    state["denoiser.model.encoder.blocks.0.0.bias"] = torch.zeros(1).expand(32)
    with pytest.raises(ValueError, match=r"x\.ckpt: .*claims 32 numbers, the file holds 1 of them"):
        load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD)


def test_two_weights_of_one_name_are_refused(unet, tmp_path):
    state = srm_names(unet, "denoiser.") | {"denoiser.encoder.blocks.0.0.bias": torch.ones(32)}
    with pytest.raises(ValueError, match=r"unexpected weight 'denoiser\.encoder\.blocks\.0\.0\.bias'"):
        load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD)
    state = spatialreasoners_names(unet, "denoiser.") | {"denoiser.model.decoder.out.0.bias": torch.ones(32)}
    with pytest.raises(ValueError, match="are the same one of a network"):
        load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD)
    state = srm_names(unet, "denoiser.") | {"denoiser.zzz.norm_with_embedding.t_emb.mlp.0.bias": torch.zeros(32)}
    with pytest.raises(ValueError, match=r"unexpected weight 'denoiser\.zzz"):
        load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD)


def test_a_moving_average_is_never_passed_over_in_silence(unet, tmp_path):
    state = srm_names(made(TINY, 1), "denoiser.") | srm_names(unet, "ema_denoiser.")
    assert_weights(load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD), unet)
    average = srm_names(unet, "ema_denoiser.module.") | {"ema_denoiser.n_averaged": torch.tensor(9)}
    partly = {name: tensor for name, tensor in average.items() if "encoder.blocks" not in name}
    state = srm_names(made(TINY, 1), "denoiser.") | partly
    with pytest.raises(ValueError, match=r"x\.ckpt: its moving average \(ema_denoiser\.\*\) holds no encoder"):
        load_model(lightning(tmp_path / "x.ckpt", state), config=UNTOLD)


def test_a_weight_that_a_type_cannot_hold_is_refused(unet, tmp_path):
    state = srm_names(unet, "denoiser.")
    state["denoiser.model.encoder.blocks.0.0.bias"][3] = 1e5
    path = lightning(tmp_path / "x.ckpt", state)
    with pytest.raises(ValueError, match=r"blocks\.0\.0\.bias' is up to 100000, more than torch\.float16 can hold"):
        load_model(path, config=UNTOLD, dtype=torch.float16)
    load_model(path, config=UNTOLD, dtype=torch.bfloat16)


def test_renamed_and_reshaped_weights_are_named(unet, tmp_path):
    rng, good = random.Random(2), srm_names(unet, "denoiser.")
    for _ in range(60):
        state, name = dict(good), rng.choice(sorted(good))
        change = rng.choice(["rename", "drop", "flatten", "transpose", "grow", "scalar", "empty"])
        tensor = state.pop(name)
        if change == "rename":
            state[name[: rng.randrange(1, len(name))] + rng.choice(["", "x", ".0", "é"])] = tensor
        elif change != "drop":
            state[name] = {
                "flatten": lambda t: t.flatten()[None],
                "transpose": lambda t: t[None].transpose(0, -1),
                "grow": lambda t: torch.cat([t, t]),
                "scalar": lambda t: t.flatten()[0].clone(),
                "empty": lambda t: t[:0].clone(),
            }[change](tensor)
        path = lightning(tmp_path / "x.ckpt", state)
        if (change == "rename" and set(state) == set(good)) or ".t_emb." in name:
            documented(path, path.read_bytes())  # a repeated embedding may be missing
            continue
        with pytest.raises(ValueError, match=re.escape(str(path))):
            load_model(path, config=UNTOLD)
