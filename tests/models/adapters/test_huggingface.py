"""Models of `transformers`, and models that are called as LLaDA, Dream and MDLM are, on the engine."""

import copy
import dataclasses

import pytest
import torch
from small_language_models import END, LENGTH, MASK, SIZE, DreamLike, LanguageModel, LLaDALike, MDLMLike

from ipr_fast import ActivePatches, TokenSchedule, generate_batch, random_patches, refine_batch
from ipr_fast.engine.capture_check import Watch
from ipr_fast.models.adapters.huggingface import Convention, HuggingFaceDenoiser

CLOSE = {"atol": 1e-5, "rtol": 0}  # of logits below 16, with sums of 16 terms in another order


def tokens(rows, seed=0):
    """Random tokens (rows, LENGTH) below MASK, a third of them masked, and active slots with padding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, MASK, (rows, LENGTH), generator=generator)
    masked = torch.rand(rows, LENGTH, generator=generator) < 0.4
    masked[0], masked[-1] = False, True
    return x.masked_fill(masked, MASK), ActivePatches.from_mask(masked, LENGTH)


def watch(head):
    """Note the shapes of a layer's inputs."""
    shapes = []
    head.register_forward_hook(lambda module, arguments, output: shapes.append(tuple(output.shape)))
    return shapes


def assert_at_slots(found, expected, active):
    torch.testing.assert_close(found[active.occupied], active.gather(expected)[active.occupied], **CLOSE)


def equal_runs(model, **options):
    """Generate and refine chains on the reference, and check that the engine's tokens are the same."""
    policy, options = random_patches(0.4), {"model": model, "schedule": TokenSchedule(4), "seed": 3, **options}
    known, values = options.pop("known", None), options.pop("values", None)
    x = generate_batch(5, known=known, known_values=values, backend="reference", **options)
    expected = refine_batch(x, policy, 2, known=known, backend="reference", **options)
    for chains in (1, 3, 5):
        found = generate_batch(5, known=known, known_values=values, max_chains=chains, **options)
        assert torch.equal(found, x)
        assert torch.equal(refine_batch(x, policy, 2, known=known, max_chains=chains, **options), expected)
    assert not torch.equal(x, expected)
    return expected


# -------------------------------------------------------------------------------------------------- of `transformers`

SMALL = {"vocab_size": SIZE, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "max_position_embeddings": 32, "pad_token_id": 0}
FAMILIES = {
    "Bert": {},
    "Roberta": {"bos_token_id": 1, "eos_token_id": 2},
    "Electra": {"embedding_size": 16},
    "ModernBert": {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "DistilBert": {},
}


def masked_lm(family="Bert", **options):
    """A tiny random model of `transformers`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = {**SMALL, **FAMILIES[family], **options}
    if family == "DistilBert":
        renamed = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
        settings = {renamed.get(name, name): value for name, value in settings.items()} | {"hidden_dim": 32}
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForMaskedLM")(config).eval()
    for parameter in model.parameters():  # larger than the initial weights, so that predictions differ
        parameter.data.mul_(4.0) if parameter.ndim > 1 else None
    return model


def tokenizer(**special):
    """A tokenizer of SIZE - 2 words, the last ones special."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {**{f"word{i}": i for i in range(SIZE - 2)}}
    for name in special.values():
        words[name] = words.pop(f"word{len(words) - 1 - list(special.values()).index(name)}")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="word0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_model_at_the_slots_and_of_these_alone(family):
    network = masked_lm(family)
    model, shapes = HuggingFaceDenoiser(network, LENGTH, mask_id=MASK), watch(network.get_output_embeddings())
    x, active = tokens(4)
    few = ActivePatches(active.index[:3, :7], active.count[:3])
    with torch.inference_mode():
        found = model(x[:3], few).logits
        everywhere = model(x[:3]).logits
    assert found.shape == (3, 7, SIZE)
    assert shapes == [(3, 7, SIZE), (3, LENGTH, SIZE)]
    with torch.no_grad():
        expected = network(input_ids=x[:3]).logits
    assert_at_slots(found, expected, few)
    torch.testing.assert_close(everywhere, expected, **CLOSE)
    assert not network.get_output_embeddings()._forward_pre_hooks


def test_logits_of_wanted_slots_alone():
    network = masked_lm()
    model, shapes = HuggingFaceDenoiser(network, LENGTH, mask_id=MASK), watch(network.get_output_embeddings())
    x, active = tokens(4)
    wanted = torch.tensor([[0, 4], [1, 2], [3, 0], [2, 1]])
    with torch.inference_mode():
        every, found = model(x, active).logits, model(x, dataclasses.replace(active, wanted=wanted)).logits
    assert shapes == [(4, active.index.shape[1], SIZE), (4, 2, SIZE)]
    torch.testing.assert_close(found, every.gather(1, wanted[..., None].expand(-1, -1, SIZE)), **CLOSE)


@pytest.mark.parametrize("family", ["Bert", "ModernBert"])
def test_the_engine_samples_as_the_definition_does(family):
    model = HuggingFaceDenoiser(masked_lm(family).double(), LENGTH, mask_id=MASK)
    known = torch.arange(LENGTH) < torch.tensor([0, 2, 5, LENGTH, 1])[:, None]
    values = torch.randint(3, MASK, (5, LENGTH), generator=torch.Generator().manual_seed(1))
    found = equal_runs(model, known=known, values=values)
    assert torch.equal(found[known], values[known])
    assert not torch.isin(found[~known], torch.tensor([*model.vocabulary.forbidden])).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cuda_graph_can_hold_a_call_without_padding(family):
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("before version 5, models make an attention mask and look at it")
    model, (x, active) = HuggingFaceDenoiser(masked_lm(family), LENGTH, mask_id=MASK), tokens(3)
    with torch.inference_mode(), Watch(family):
        model(x, active)


def test_padding_of_any_side_is_not_attended_to():
    network = masked_lm("ModernBert").double()  # with rotary positions
    model = HuggingFaceDenoiser(network, LENGTH, mask_id=MASK, padded=True)
    x = tokens(1, seed=5)[0].expand(3, -1).clone().masked_fill(torch.arange(LENGTH) >= 7, 0)  # on the right
    x[1] = x[0].roll(3)  # on the left
    with torch.no_grad():
        logits = model(x).logits
        alone = HuggingFaceDenoiser(network, 7, mask_id=MASK)(x[:1, :7]).logits[0]
    torch.testing.assert_close(logits[0, :7], alone)
    torch.testing.assert_close(logits[1, 3:], alone)


def test_weights_of_bfloat16_give_logits_of_bfloat16():
    exact = HuggingFaceDenoiser(masked_lm(), LENGTH, mask_id=MASK)
    model = HuggingFaceDenoiser(copy.deepcopy(exact.model).bfloat16(), LENGTH, mask_id=MASK)
    x, active = tokens(4)
    with torch.no_grad():
        found, expected = model(x, active).logits, exact(x, active).logits
    assert found.dtype == torch.bfloat16
    # a hundred operations, each rounded to 2**-9 of values that are as large as the largest logit
    assert (found - expected).abs().max() < 10 * 2**-9 * expected.abs().max()
    refined = refine_batch(x.clamp(max=MASK - 1), random_patches(0.5), 1, model=model, schedule=TokenSchedule(2))
    assert ((refined >= 0) & (refined < SIZE) & (refined != MASK)).all()


def test_a_compiled_model_predicts_the_same():
    network = masked_lm()
    x, active = tokens(3)
    few = ActivePatches(active.index[:, :7].contiguous(), active.count)
    with torch.no_grad():
        expected = HuggingFaceDenoiser(network, LENGTH, mask_id=MASK)(x, few).logits
        compiled = HuggingFaceDenoiser(torch.compile(network, backend="eager"), LENGTH, mask_id=MASK)(x, few).logits
        network.compile(backend="eager")
        in_place = HuggingFaceDenoiser(network, LENGTH, mask_id=MASK)(x, few).logits
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(in_place, expected)


# ----------------------------------------------------------------------------------------------------------- vocabulary


def test_the_tokenizer_tells_the_mask_and_what_is_never_sampled():
    words = tokenizer(mask_token="[MASK]", pad_token="[PAD]", sep_token="[SEP]", cls_token="[CLS]")
    model = HuggingFaceDenoiser(masked_lm(), LENGTH, tokenizer=words)
    special = {words.mask_token_id, words.pad_token_id, words.sep_token_id, words.cls_token_id}
    assert len(special) == 4
    assert model.vocabulary.mask_id == words.mask_token_id
    assert set(model.vocabulary.forbidden) == special | {SIZE - 2, SIZE - 1}  # the last two are beyond it
    assert model.pad_id == words.pad_token_id


def test_the_end_of_a_text_may_be_sampled_by_models_that_generate_it():
    words = tokenizer(mask_token="[MASK]", eos_token="[END]", unk_token="[UNK]")
    words.pad_token = "[END]"
    end = words.eos_token_id
    assert end not in HuggingFaceDenoiser(LLaDALike(), LENGTH, tokenizer=words).vocabulary.forbidden
    unknown = HuggingFaceDenoiser(LLaDALike(), LENGTH, tokenizer=words).vocabulary
    assert words.unk_token_id in unknown.forbidden
    assert end in HuggingFaceDenoiser(masked_lm(), LENGTH, tokenizer=words).vocabulary.forbidden


def test_ids_that_are_given_take_precedence():
    model = HuggingFaceDenoiser(LLaDALike(), LENGTH, mask_id=3, pad_id=5, never=[7, 5])
    assert model.vocabulary.mask_id == 3
    assert model.vocabulary.forbidden == (3, 5, 7)
    assert model.pad_id == 5


# ---------------------------------------------------------------------------------------------------------- conventions


def plain(network, x, **inputs):
    """The logits of a model at all positions, as its project's code gets them."""
    with torch.no_grad():
        output = network(input_ids=x, **inputs)
    return getattr(output, "logits", output)


def test_llada_is_called_with_tokens_alone_where_nothing_is_padded():
    network = LLaDALike()
    x, active = tokens(4)
    found = HuggingFaceDenoiser(network, LENGTH)(x, active).logits
    assert_at_slots(found, plain(network, x), active)


def test_logits_of_dream_arrive_at_the_next_position():
    network = DreamLike()
    model = HuggingFaceDenoiser(network, LENGTH)
    x, active = tokens(4)
    logits = plain(network, x)
    expected = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    assert_at_slots(model(x, active).logits, expected, active)
    torch.testing.assert_close(model(x).logits, expected)
    network.get_output_embeddings = lambda: None  # logits of all positions
    assert_at_slots(model(x, active).logits, expected, active)


@pytest.mark.parametrize("network", [LLaDALike(), DreamLike()], ids=lambda network: network.kind)
def test_a_prompt_padded_on_the_left_predicts_as_without_padding(network):
    network.double()
    padded = HuggingFaceDenoiser(network, LENGTH, prompt_length=5, padded=True)
    short = HuggingFaceDenoiser(network, LENGTH - 3, prompt_length=2)
    x = tokens(1, seed=2)[0].masked_fill(torch.arange(LENGTH) == 7, END)  # generated: no padding
    x[:, :3] = END
    with torch.no_grad():
        found, expected = padded(x).logits[:, 3:], short(x[:, 3:]).logits
        unmasked = plain(network, x)[:, 3:]
    first = 1 if network.kind == "Dream" else 0  # of a shifted model, position 0 reads itself
    torch.testing.assert_close(found[:, first:], expected[:, first:])
    assert (found[:, first:] - unmasked[:, first:]).abs().max() > 0.1
    assert padded.padding(x)[0].tolist() == [True] * 3 + [False] * 7


def test_an_end_that_was_generated_is_no_padding():
    x = torch.full((1, LENGTH), END)
    model = HuggingFaceDenoiser(LLaDALike(), LENGTH, prompt_length=4, padded=True)
    assert model.padding(x)[0].tolist() == [True] * 4 + [False] * 6
    x[0, 1] = 3
    assert model.padding(x)[0].tolist() == [True] + [False] * 9


@pytest.mark.parametrize("network", [LLaDALike(), DreamLike()], ids=lambda network: network.kind)
def test_guidance_moves_logits_away_from_those_without_a_prompt(network):
    x, active = tokens(4)
    x[:, :4] = torch.randint(0, MASK, (4, 4), generator=torch.Generator().manual_seed(9))
    x[1, :2] = END  # padding, not attended to by either
    without = x.clone()
    without[:, :4] = MASK
    model = HuggingFaceDenoiser(network, LENGTH, prompt_length=4, padded=True)
    guided = HuggingFaceDenoiser(network, LENGTH, prompt_length=4, padded=True, guidance=1.5)
    with torch.no_grad():
        given, found = model(x, active).logits, guided(x, active).logits
        un = model(without, active).logits
        un[1] = HuggingFaceDenoiser(network, LENGTH - 2)(without[1:2, 2:]).logits[0][active.index[1] - 2]
    expected = un + (1.5 + 1) * (given - un)
    torch.testing.assert_close(found[active.occupied], expected[active.occupied], atol=1e-4, rtol=0)
    assert (found - given)[active.occupied].abs().max() > 0.1


def test_mdlm_gets_the_time_of_its_tokens():
    network, x = MDLMLike(), tokens(4)[0]
    x[x == MASK] = SIZE - 1  # its mask comes last
    model = HuggingFaceDenoiser(network, LENGTH)
    assert model.vocabulary.mask_id == SIZE - 1
    torch.testing.assert_close(model(x).logits, plain(network, x, timesteps=torch.zeros(4)))
    conditioned = MDLMLike(time_conditioning=True)
    share = (x == SIZE - 1).float().mean(1)
    assert share[[0, -1]].tolist() == [0, 1]
    sigma = -torch.log(1 - (1 - 1e-3) * share)
    found = HuggingFaceDenoiser(conditioned, LENGTH)(x).logits
    torch.testing.assert_close(found, plain(conditioned, x, timesteps=sigma), atol=1e-4, rtol=0)


@pytest.mark.parametrize("network", [LLaDALike(), DreamLike(), MDLMLike(True)], ids=lambda network: network.kind)
@pytest.mark.parametrize("guidance", [0, 0.7])
def test_every_convention_runs_on_the_engine_as_on_the_definition(network, guidance):
    prompt = torch.randint(0, MASK, (5, LENGTH), generator=torch.Generator().manual_seed(4))
    prompt[2, :2] = END
    padded = network.kind != "mdlm"
    model = HuggingFaceDenoiser(network.double(), LENGTH, prompt_length=3, guidance=guidance, padded=padded)
    found = equal_runs(model, known=torch.arange(LENGTH).expand(5, -1) < 3, values=prompt)
    assert not (found == model.vocabulary.mask_id).any()


class Tinted(LLaDALike):
    """Takes embeddings (B, d) that are added to its tokens'."""

    def forward(self, input_ids, tint):
        return self.lm_head(self.network(input_ids, shift=tint[:, None]))


@pytest.mark.parametrize("guidance", [{}, {"prompt_length": 2, "guidance": 1.5}], ids=["plain", "guided"])
def test_a_condition_is_more_inputs_of_a_chain(guidance):
    model = HuggingFaceDenoiser(Tinted(), LENGTH, **guidance)
    tint = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))
    known = torch.arange(LENGTH) < torch.tensor([2, 9, 4, 2, 7])[:, None]
    prompt = torch.full((5, LENGTH), 3)

    def run(rows, **options):
        return generate_batch(
            len(rows),
            model=model,
            known=known[rows],
            known_values=prompt[rows],
            schedule=TokenSchedule(3),
            chain_ids=torch.tensor(rows),
            condition={"tint": tint[rows]},
            **options,
        )

    alone = torch.cat([run([chain], backend="reference") for chain in range(5)])
    assert torch.equal(run([0, 1, 2, 3, 4], max_chains=2), alone)
    with pytest.raises(ValueError, match="condition must be a dict of the model's inputs other than input_ids"):
        generate_batch(5, model=model, condition={"input_ids": tint})


@pytest.mark.parametrize(
    ("network", "options"),
    [(LLaDALike(), {}), (DreamLike(), {"padded": True, "guidance": 1.0, "prompt_length": 2}), (MDLMLike(), {})],
    ids=["llada", "dream", "mdlm"],
)
def test_a_cuda_graph_can_hold_a_call(network, options):
    model, (x, active) = HuggingFaceDenoiser(network, LENGTH, **options), tokens(3)
    with torch.inference_mode(), Watch("model"):
        model(x, active)


def test_a_convention_of_ones_own():
    class Other(DreamLike):
        kind = "other"

    x = tokens(3)[0]
    shifted = HuggingFaceDenoiser(Other(), LENGTH, convention=Convention(shift=True, attention=None))
    by_name = HuggingFaceDenoiser(Other(), LENGTH, convention="dream")
    torch.testing.assert_close(shifted(x).logits, by_name(x).logits)
    assert not HuggingFaceDenoiser(Other(), LENGTH).convention.shift


# ------------------------------------------------------------------------------------------------------------ bad input


class Short(LLaDALike):
    def forward(self, input_ids):
        return super().forward(input_ids).logits[..., :-1]


class Wordless(LLaDALike):
    def forward(self, input_ids):
        return None


class Maskless(LanguageModel):
    kind = "masked"


@pytest.mark.parametrize(
    ("arguments", "options", "problem"),
    [
        ((object(), LENGTH), {}, "model must be an nn.Module with a `config`, got object"),
        ((torch.nn.Linear(1, 1), LENGTH), {}, "model must be an nn.Module with a `config`, got Linear"),
        ((LLaDALike(), 33), {}, r"length must be an int in 1\.\.32, got 33"),
        ((LLaDALike(), 0), {}, "length must be"),
        ((LLaDALike(), LENGTH), {"convention": "mdm"}, "convention must be a Convention or one of masked_lm, llada,"),
        ((LLaDALike(), LENGTH), {"prompt_length": 11}, r"prompt_length must be an int in 0\.\.10, got 11"),
        ((LLaDALike(), LENGTH), {"guidance": 1.0}, "guidance needs a prompt to mask"),
        ((LLaDALike(), LENGTH), {"guidance": -1, "prompt_length": 2}, "guidance must be a finite number >= 0"),
        ((LLaDALike(), LENGTH), {"mask_id": 25}, r"mask_id must be an int in 0\.\.24, got 25"),
        ((LLaDALike(), LENGTH), {"pad_id": 24}, r"pad_id must be an int in 0\.\.23, got 24"),
        ((LLaDALike(), LENGTH), {"never": range(24)}, "never and mask_id must leave a token"),
        ((LLaDALike(), LENGTH), {"padded": 1}, "padded must be a bool, got 1"),
        ((LLaDALike(), LENGTH), {"padded": True}, "padded needs a prompt_length >= 1: 21, the id of padding, is also"),
        ((MDLMLike(), LENGTH), {"padded": True}, "padded must be False for a model that takes no attention mask"),
        ((Maskless(), LENGTH), {"mask_id": 2, "padded": True}, "padded needs a pad_id"),
        ((Maskless(), LENGTH), {}, "mask_id must be given: neither the tokenizer nor the model's configuration has"),
    ],
)
def test_bad_arguments_are_named(arguments, options, problem):
    with pytest.raises(ValueError, match=f"^{problem}"):
        HuggingFaceDenoiser(*arguments, **options)


@pytest.mark.parametrize(
    ("network", "problem"),
    [
        (Short(), r"model: Short must return logits of shape \(2, 10, 24\), got \(2, 10, 23\) of torch.float32"),
        (Wordless(), "model: Wordless must return logits of shape"),
        (LLaDALike().train(), "is in training mode"),
    ],
)
def test_models_that_break_the_protocol_are_named(network, problem):
    if network.training:
        network.dropout = torch.nn.Dropout()
    with pytest.raises(ValueError, match=problem):
        generate_batch(2, model=HuggingFaceDenoiser(network, LENGTH))


def test_a_mask_without_an_embedding_is_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    network = transformers.BertForMaskedLM(config).eval()
    with pytest.raises(ValueError, match=r"^mask_id must be an int in 0\.\.19, got 20"):
        HuggingFaceDenoiser(network, 4, mask_id=20)
