"""Created checkpoints: reproducible, whole or absent, read by the usual libraries, and with numerics that make
agreement mean something.
"""

import dataclasses
import errno
import json

import ml_dtypes
import numpy as np
import pytest
from checkpoint_helpers import MICRO, load_all

from model_defs.checkpoint import create, random_weights
from model_defs.checkpoint.create import create_checkpoint
from model_defs.checkpoint.names import expected_tensors, ignorable
from model_defs.checkpoint.random_tokenizer import CHAT_TEMPLATE
from model_defs.checkpoint.reader import Checkpoint
from model_defs.checkpoint.verify import require_complete, verify
from model_defs.config_schemas import SCHEMAS, config_for_schema
from model_defs.errors import CheckpointError, ConfigError, StorageError
from model_defs.presets import preset


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


def test_values_depend_on_seed_and_name_alone(tmp_path):
    one = create_checkpoint(MICRO, tmp_path / "one", seed=5, dtype="float32", max_shard_bytes=30_000)
    two = create_checkpoint(MICRO, tmp_path / "two", seed=5, dtype="float32", max_shard_bytes=1 << 30)
    other = create_checkpoint(MICRO, tmp_path / "other", seed=6, dtype="float32")
    assert len(one.files) > 3
    assert [path.name for path in two.files] == ["model.safetensors"]
    assert same(load_all(tmp_path / "one"), load_all(tmp_path / "two"))
    assert not any(np.array_equal(value, other.array(name)) for name, value in load_all(tmp_path / "one").items())
    flat = [value.tobytes() for value in load_all(tmp_path / "one").values()]
    assert len(set(flat)) == len(flat)  # no two tensors share their values


def test_small_blocks_give_the_same_values(tmp_path, monkeypatch, micro):
    monkeypatch.setattr(random_weights, "_BLOCK_ELEMENTS", 100)
    create_checkpoint(MICRO, tmp_path / "c", seed=1, dtype="float32")
    assert same(load_all(tmp_path / "c"), load_all(micro))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_are_the_rounded_ones(tmp_path, micro, dtype: str):
    checkpoint = create_checkpoint(MICRO, tmp_path / "c", seed=1, dtype=dtype)
    stored = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    for name, value in load_all(micro).items():
        np.testing.assert_array_equal(checkpoint.array(name), value.astype(stored))


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_schema_is_whole(tmp_path, schema: str, micro):
    seen = []
    checkpoint = create_checkpoint(
        MICRO, tmp_path / "c", seed=1, dtype="float32", schema=schema, on_progress=lambda *step: seen.append(step)
    )
    assert checkpoint.config == config_for_schema(MICRO, schema)
    assert verify(checkpoint, scan_values=True).ok
    assert seen[-1][0] == seen[-1][1] == checkpoint.total_bytes
    prefix = "language_model." if schema == "vl-01" else ""
    for name, value in load_all(micro).items():
        np.testing.assert_array_equal(checkpoint.array(prefix + name), value)


def test_shards_respect_the_limit_and_the_index_is_complete(micro):
    index = json.loads((micro / "model.safetensors.index.json").read_text())
    stored = load_all(micro)
    assert set(index["weight_map"]) == set(stored)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in stored.values())
    for shard in set(index["weight_map"].values()):
        assert sum(stored[name].nbytes for name, file in index["weight_map"].items() if file == shard) <= 40_000


# --- Failures leave nothing behind -----------------------------------------------------------------------------------


def test_existing_folders_are_not_overwritten(tmp_path, micro):
    with pytest.raises(CheckpointError, match="already exists"):
        create_checkpoint(MICRO, micro)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="already exists"):
        create_checkpoint(MICRO, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    create_checkpoint(MICRO, tmp_path / "empty")


class StoppedWriter:
    """Stands in for the disk: gives out after some bytes of the weights."""

    def __init__(self, fault: BaseException) -> None:
        self.fault, self.real = fault, create.random_blocks

    def __call__(self, config, name, shape, **options):
        if "layers.1" in name:
            raise self.fault
        yield from self.real(config, name, shape, **options)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StorageError),
        (OSError(errno.EIO, "Input/output error"), StorageError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MemoryError),
    ],
)
def test_a_failure_leaves_nothing(tmp_path, monkeypatch, fault, expected):
    monkeypatch.setattr(create, "random_blocks", StoppedWriter(fault))
    with pytest.raises(expected) as caught:
        create_checkpoint(MICRO, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
    if expected is StorageError:
        assert caught.value.exit_code == 3


def test_too_little_space_is_told_before_writing(tmp_path):
    with pytest.raises(StorageError, match=r"912\.2 GB are needed"):
        create_checkpoint(preset("text-01"), tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        create_checkpoint(MICRO, tmp_path / "file" / "c")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "int8"}, "dtype"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"max_shard_bytes": 0}, "max_shard_bytes"),
        ({"schema": "gguf"}, "schema"),
    ],
)
def test_bad_arguments(tmp_path, options: dict, match: str):
    with pytest.raises((CheckpointError, ConfigError), match=match):
        create_checkpoint(MICRO, tmp_path / "c", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_too_small_for_a_tokenizer(tmp_path):
    little = dataclasses.replace(MICRO, vocab_size=100, bos_token_id=None, eos_token_id=None)
    with pytest.raises(CheckpointError, match="at least 260"):
        create_checkpoint(little, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
    assert create_checkpoint(little, tmp_path / "c", with_tokenizer=False).tokenizer_files == (
        tmp_path / "c" / "generation_config.json",
    )


# --- Tokenizer -------------------------------------------------------------------------------------------------------

TEXTS = [
    "",
    "Hello there, world!",
    "  spaces\n\tand\r\nlines ",
    "ünïcödé 你好 🙂 \u0000\u200b",
    "def f(x): return x**2 # 3.14",
]


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_tokenizer_covers_the_vocabulary(tmp_path, name: str):
    from tokenizers import Tokenizer

    from model_defs.checkpoint.random_tokenizer import write_tokenizer

    config = preset(name)
    write_tokenizer(config, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert sorted(tokenizer.get_vocab().values()) == list(range(config.vocab_size))
    assert tokenizer.token_to_id("<beginning_of_sentence>") == config.bos_token_id
    assert tokenizer.token_to_id("<end_of_sentence>") == config.eos_token_id
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert len(ids) <= len(text.encode())
    assert len(tokenizer.encode("the rain in the other town").ids) < 20  # the merges are used
    turn = tokenizer.encode("<beginning_of_sentence>user name=user\nHi<end_of_sentence>").ids
    assert (turn[0], turn[-1]) == (config.bos_token_id, config.eos_token_id)
    assert tokenizer.decode([config.bos_token_id, *tokenizer.encode("Hi").ids]) == "Hi"
    first = (tmp_path / "tokenizer.json").read_bytes()
    write_tokenizer(config, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == first


def test_chat_template_writes_the_published_turns():
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
    ]
    assert template.render(messages=messages, add_generation_prompt=True) == (
        "<beginning_of_sentence>system ai_setting=assistant\nBe brief.<end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\nHello!<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\nAB<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n"
    )


# --- transformers ----------------------------------------------------------------------------------------------------


def test_transformers_loads_it_and_saves_it_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    made = create_checkpoint(MICRO, tmp_path / "made", schema="hf", max_shard_bytes=40_000)
    model, info = transformers.MiniMaxForCausalLM.from_pretrained(
        tmp_path / "made", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert all(ignorable(name) for name in info["missing_keys"])
    head = model.lm_head.weight.detach().float().numpy()
    np.testing.assert_array_equal(head, made.array("lm_head.weight").astype(np.float32))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "made")
    assert tokenizer.eos_token_id == MICRO.eos_token_id
    assert tokenizer.decode(tokenizer.encode(TEXTS[3])) == TEXTS[3]

    model.save_pretrained(tmp_path / "saved")
    saved = Checkpoint.open(tmp_path / "saved")
    assert saved.config == MICRO
    report = verify(saved)
    assert report.ok
    assert report.tensors_ignored == 8  # the derived buffers of two lightning layers
    require_complete(saved, MICRO)
    for name in expected_tensors(MICRO):
        np.testing.assert_array_equal(saved.array(name), made.array(name))


# --- Numerics --------------------------------------------------------------------------------------------------------

# Written down before measuring: a logit scale of 6 means within 10 %; a part "matters" if dropping or changing it moves
# logits by more than 1 % of that scale on average, which is 300 times the tolerance of an fp32 engine (2e-4).
SCALE_RANGE, MATTERS = (5.4, 6.6), 0.06


class Model:
    """The PyTorch definition filled from a checkpoint."""

    def __init__(self, folder) -> None:
        import torch

        from model_defs.text_model import TextModel
        from model_defs.weights import weight_recipes

        self.torch, self.checkpoint = torch, Checkpoint.open(folder)
        self.module = TextModel(self.checkpoint.config, torch.float32)
        parameters = dict(self.module.named_parameters())
        for name, recipe in weight_recipes(self.checkpoint.config).items():
            parameters[name].data.copy_(torch.from_numpy(recipe.assemble(self.checkpoint.array).astype(np.float32)))

    def logits(self, ids):
        torch = self.torch
        batch, tokens = ids.shape
        with torch.no_grad():
            logits, _, taps = self.module(
                ids,
                torch.full((batch,), tokens),
                torch.zeros(batch, dtype=torch.int64),
                torch.arange(tokens).expand(batch, tokens),
                self.module.new_states(batch, tokens),
            )
        return logits[0], taps


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Model:
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("tiny") / "c"
    create_checkpoint(preset("tiny"), folder)
    return Model(folder)


def random_ids(model: Model, tokens: int):
    generator = model.torch.Generator().manual_seed(0)
    return model.torch.randint(0, model.checkpoint.config.vocab_size, (1, tokens), generator=generator)


def test_logits_are_spread_like_a_trained_models(tiny):
    logits, taps = tiny.logits(random_ids(tiny, 256))
    assert SCALE_RANGE[0] < float(logits.abs().amax(-1).mean()) < SCALE_RANGE[1]
    assert len(set(logits.argmax(-1).tolist())) > 100  # the next token depends on the text
    sizes = [float(hidden.square().mean().sqrt()) for hidden in taps.hidden]
    assert max(sizes) < 1.2 * min(sizes)  # neither growing nor vanishing with depth
    for router_BTE in taps.router_logits:
        assert 1 < float(router_BTE.std()) < 2
        chosen = set(router_BTE.topk(2).indices.flatten().tolist())
        assert chosen == set(range(tiny.checkpoint.config.num_local_experts))


def test_a_larger_vocabulary_has_the_same_logit_scale(tmp_path):
    """The largest of more logits is larger, so lm_head's size must follow the vocabulary."""
    pytest.importorskip("torch")
    wide = dataclasses.replace(preset("tiny").truncated(1), slope_layers=1, vocab_size=16384)
    create_checkpoint(wide, tmp_path / "c", with_tokenizer=False)
    model = Model(tmp_path / "c")
    logits, _ = model.logits(random_ids(model, 100))
    assert SCALE_RANGE[0] < float(logits.abs().amax(-1).mean()) < SCALE_RANGE[1]


@pytest.mark.parametrize("layer", [0, 6, 7])  # the first, and the last of each kind
def test_every_part_of_every_layer_matters(tiny, layer: int):
    ids = random_ids(tiny, 96)
    before, _ = tiny.logits(ids)
    block = tiny.module.layers[layer]
    attention = block.self_attn
    parts = {
        "attention": getattr(attention, "out_proj", None) or attention.o_proj,
        "experts": block.block_sparse_moe.fc2,
        "router": block.block_sparse_moe.gate,
    }
    for name, part in parts.items():
        kept = part.weight.data.clone()
        part.weight.data.zero_()
        after, _ = tiny.logits(ids)
        part.weight.data.copy_(kept)
        assert float((after - before).abs().mean()) > MATTERS, name
    for name in ("input_layernorm", "post_attention_layernorm"):
        weight = getattr(block, name).weight.data
        kept = weight.clone()
        weight.fill_(1)
        after, _ = tiny.logits(ids)
        weight.copy_(kept)
        assert float((after - before).abs().mean()) > MATTERS, name


def test_one_expert_and_one_decay_matter(tiny):
    ids = random_ids(tiny, 96)
    before, _ = tiny.logits(ids)
    layer = tiny.module.layers[3]
    expert = layer.block_sparse_moe.fc2.weight.data[5]
    kept = expert.clone()
    expert.zero_()
    after, _ = tiny.logits(ids)
    expert.copy_(kept)
    assert float((after - before).abs().max()) > MATTERS
    slopes = layer.self_attn.slopes
    for head, slope in enumerate(list(slopes)):
        slopes[head] = slope * 1.1
        after, _ = tiny.logits(ids)
        slopes[head] = slope
        assert float((after - before).abs().max()) > MATTERS, head


def test_rotary_positions_matter(tiny):
    ids = random_ids(tiny, 64)
    before, _ = tiny.logits(ids)
    context = type(tiny.module)._context

    def unturned(self, *args):
        found = context(self, *args)
        return dataclasses.replace(
            found, cos_BTR=tiny.torch.ones_like(found.cos_BTR), sin_BTR=tiny.torch.zeros_like(found.sin_BTR)
        )

    type(tiny.module)._context = unturned
    try:
        after, _ = tiny.logits(ids)
    finally:
        type(tiny.module)._context = context
    assert float((after - before).abs().mean()) > MATTERS
