"""Small files in the layouts of the published implementation and of spatialreasoners."""

import torch

from ipr_fast import load_model
from ipr_fast.models import SRMUNet, SRMUNetConfig

TINY = SRMUNetConfig(1, 16, 4, (32, 64), (False, True), num_blocks=1, num_head_channels=32, t_emb_dim=32, d_emb=16)


UNTOLD = {"image_size": 16, "patch_size": 4, "num_head_channels": 32}
OF_LIBRARY = UNTOLD | {
    "level_scale": 1000,
    "level_shift": -1,
    "activation": "silu",
    "max_period": 10_000,
    "parameterization": "ut",
    "flow": "rectified",
    "variance": "learned_range",
}


def made(config, seed):
    torch.manual_seed(seed)
    return SRMUNet(config).eval().requires_grad_(False)


def srm_names(model, prefix):
    """A network's weights as Lightning saves them, the embedding repeated in every block."""
    state = {}
    for name, tensor in model.state_dict().items():
        state[prefix + name] = tensor.clone()
        if name.endswith("norm_with_embedding.norm.weight"):
            for shared, repeated in model.time_embedding.state_dict().items():
                state[f"{prefix}{name.removesuffix('norm.weight')}t_emb.{shared}"] = repeated.clone()
    return state


def spatialreasoners_names(model, prefix):
    state = {}
    for name, tensor in srm_names(model, "").items():
        state[prefix + name.removeprefix("model.").replace("time_embedding.", "t_emb.")] = tensor
    return state


def lightning(path, state):
    torch.save({"epoch": 3, "global_step": 1000, "state_dict": state, "optimizer_states": [], "callbacks": {}}, path)
    return path


def assert_weights(model, expected):
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def variant(state, kind):
    """A state dict of a network that spatialreasoners can build and SRMUNet is not; or with one thing wrong."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    conv_in, conv_out = "denoiser.model.encoder.blocks.0.0.weight", "denoiser.model.decoder.out.2.weight"
    a_block = "denoiser.model.encoder.blocks.1.0.norm_with_embedding"
    if kind == "labels":
        state["denoiser.class_embedding.weight"] = torch.zeros(10, 32)
    elif kind == "no bottleneck":
        state = {name: tensor for name, tensor in state.items() if "bottleneck" not in name}
    elif kind == "concat_mask":
        state[conv_in] = torch.zeros(32, 3, 3, 3)
    elif kind == "no variance":
        state[conv_out] = state[conv_out][:2]
    elif kind == "scale shift":
        name = "denoiser.model.bottleneck.blocks.0.norm_with_embedding.embedding_layer.1.weight"
        state[name] = torch.cat([state[name]] * 2)
    elif kind == "embeddings differ":
        state[f"{a_block}.t_emb.mlp.2.bias"] += 1
    elif kind == "embedding missing":
        state = {name: tensor for name, tensor in state.items() if "time_embedding" not in name}
    elif kind == "uneven blocks":
        del state["denoiser.model.encoder.blocks.3.0.conv_1.2.weight"]
    elif kind == "missing":
        del state[f"{a_block}.norm.bias"]
    elif kind == "extra":
        state["denoiser.model.encoder.blocks.1.0.gate"] = torch.zeros(2, 3)
    elif kind == "integers":
        state[f"{a_block}.norm.bias"] = state[f"{a_block}.norm.bias"].int()
    elif kind == "sparse":
        state[f"{a_block}.norm.bias"] = state[f"{a_block}.norm.bias"].to_sparse()
    elif kind == "meta":
        state[f"{a_block}.norm.bias"] = state[f"{a_block}.norm.bias"].to("meta")
    elif kind == "mixed":
        state[f"{a_block}.norm.bias"] = state[f"{a_block}.norm.bias"].half()
    elif kind == "transformer":
        state = {"denoising_model.denoiser.blocks.0.attn.qkv.weight": torch.zeros(3, 3)}
    return state


def documented(path, data):
    """Loading these bytes gives a model, or the documented error, which names the file: then None."""
    path.write_bytes(data)
    try:
        return load_model(path, config=UNTOLD)
    except ValueError as error:
        message = str(error)
    assert str(path) in message
    return None
