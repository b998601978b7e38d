"""Generation against plain reference loops, on a toy session whose logits depend on a sequence's whole history."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.generation import Generation, GenerationConfig, GenerationError, generate

VOCAB = 37


def toy_logits(history: tuple[int, ...]) -> np.ndarray:
    """Logits that any change of the history changes."""
    digest = hashlib.sha256(np.array(history, np.int64).tobytes()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little")).normal(0, 3, VOCAB).astype(np.float32)


@dataclass
class ToyState:
    histories: list[list[int]]

    @property
    def lengths(self):
        return np.array([len(history) for history in self.histories])


class ToySession:
    """The session contract, with garbage for rows that got no token."""

    vocab_size = VOCAB

    def __init__(self, max_seq_len=64, max_batch_size=8):
        self.max_seq_len, self.max_batch_size = max_seq_len, max_batch_size
        self.fed = 0

    def new_state(self, batch_size):
        return ToyState([[] for _ in range(batch_size)])

    def prefill(self, prompts, state, chunk=None):
        lengths = np.array([len(prompt) for prompt in prompts])
        ids = np.zeros((len(prompts), lengths.max()), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        return self.forward(ids, lengths, state).logits[:, 0]

    def decode(self, tokens_B, state):
        return self.forward(np.asarray(tokens_B)[:, None], np.ones(len(tokens_B), np.int64), state).logits[:, 0]

    def forward(self, ids_BT, new_lengths_B, state, positions="last", taps=False):
        out = np.full((len(ids_BT), VOCAB), np.nan, np.float32)
        for row, count in enumerate(new_lengths_B):
            state.histories[row] += [int(token) for token in ids_BT[row, :count]]
            assert len(state.histories[row]) <= self.max_seq_len
            self.fed += int(count)
            if count:
                out[row] = toy_logits(tuple(state.histories[row]))
        return SimpleNamespace(logits=out[:, None])


class Letters:
    """Detokenizer: token i is one letter; 36 is two bytes of text at once."""

    def push(self, token):
        return chr(ord("a") + token % 26) if token < 36 else "<>"

    def finish(self):
        return ""


def spell(tokens):
    return "".join(map(Letters().push, tokens))


def reference(prompt, config: GenerationConfig, capacity=64):
    """The definition, one sequence, no cleverness: sort everything, sample by a linear walk over ids."""
    stream = np.random.Generator(np.random.Philox(key=config.seed))
    history, out = list(prompt), []
    while len(out) < min(config.max_new_tokens, capacity - len(prompt) + 1):
        scores = toy_logits(tuple(history)).astype(np.float64)
        for token in set(history):
            scores[token] *= config.repetition_penalty if scores[token] < 0 else 1 / config.repetition_penalty
        for token in set(out):
            scores[token] -= config.presence_penalty + config.frequency_penalty * out.count(token)
        if config.temperature == 0:
            token = int(np.argmax(scores))
        else:
            order = sorted(range(VOCAB), key=lambda i: (-scores[i], i))
            if config.top_k:
                order = order[: config.top_k]
            weights = {i: np.exp((scores[i] - max(scores)) / config.temperature) for i in order}
            kept, mass = [], 0.0
            for i in order:
                kept.append(i)
                mass += weights[i]
                if config.top_p < 1 and mass >= config.top_p * sum(weights.values()):
                    break
            kept.sort()
            target, running = stream.random() * sum(weights[i] for i in kept), 0.0
            for token in kept:
                running += weights[token]
                if running > target:
                    break
        if token in config.stop_token_ids:
            return out, "stop"
        out.append(token)
        history.append(token)
    return out, "length"


configs = st.builds(
    GenerationConfig,
    max_new_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 10, VOCAB, 100]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -0.25]),
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=8),
)
prompts = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(prompts, st.data())
def test_a_ragged_batch_gives_each_row_what_it_gets_alone(batch, data):
    per_row = [data.draw(configs) for _ in batch]
    for prompt, config, result in zip(batch, per_row, generate(ToySession(), batch, per_row), strict=True):
        assert (result.tokens, result.finish_reason) == reference(prompt, config)
        assert result.prompt_tokens == len(prompt)


def test_temperature_draws_follow_the_softmax():
    session = ToySession(max_batch_size=4000)
    config = [GenerationConfig(max_new_tokens=1, temperature=1.5, seed=seed) for seed in range(4000)]
    drawn = [result.tokens[0] for result in generate(session, [[5, 6]] * 4000, config)]
    scores = toy_logits((5, 6)).astype(np.float64) / 1.5
    expected = np.exp(scores) / np.exp(scores).sum()
    counts = np.bincount(drawn, minlength=VOCAB)
    # Chi-square with about 36 degrees of freedom: 80 is beyond the 99.99th percentile.
    assert np.sum((counts - 4000 * expected) ** 2 / (4000 * expected)) < 80


def test_same_seed_same_tokens_other_seed_other_tokens():
    def run(seed):
        return generate(ToySession(), [[1]], GenerationConfig(temperature=1.0, seed=seed, max_new_tokens=20))[0].tokens

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_stop_string_across_tokens_is_cut_and_never_shown():
    greedy, _ = reference([4], GenerationConfig(max_new_tokens=12))
    text = spell(greedy)
    stop = text[5:8]
    shown = []
    config = GenerationConfig(max_new_tokens=12, stop_strings=[stop, "never there"])
    result = generate(ToySession(), [[4]], config, lambda event: shown.append(event.text), detokenizer=Letters)[0]
    assert result.text == "".join(shown) == text[: text.find(stop)]
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)


def test_held_back_text_comes_out_at_the_length_limit():
    greedy, _ = reference([4], GenerationConfig(max_new_tokens=6))
    almost = spell(greedy)[-2:] + "#"
    config = GenerationConfig(max_new_tokens=6, stop_strings=[almost])
    events = list(Generation(ToySession(), [[4]], config, detokenizer=Letters))
    assert "".join(event.text for event in events) == spell(greedy)
    assert events[-2].text == ""
    assert events[-1].finish_reason == "length"


def test_stop_token_is_reported_but_is_not_output():
    greedy, _ = reference([4], GenerationConfig(max_new_tokens=6))
    stop = greedy[3]
    result = generate(ToySession(), [[4]], GenerationConfig(max_new_tokens=6, stop_token_ids=[stop]))[0]
    assert result.tokens == greedy[: greedy.index(stop)]
    assert (result.finish_reason, result.stop_reason, result.unfed_tokens) == ("stop", stop, [stop])


def test_finished_rows_are_fed_no_more():
    session = ToySession()
    lengths = [1, 9, 4]
    configs = [GenerationConfig(max_new_tokens=n) for n in lengths]
    state = session.new_state(3)
    results = generate(session, [[1], [2, 3], [4]], configs, state=state)
    assert [len(result.tokens) for result in results] == lengths
    assert list(state.lengths) == [1 + 0, 2 + 8, 1 + 3]


def test_a_state_is_continued_as_one_sequence():
    session = ToySession()
    state = session.new_state(1)
    first = generate(session, [[7, 8]], GenerationConfig(max_new_tokens=5), state=state)[0]
    second = generate(session, [[*first.unfed_tokens, 9]], GenerationConfig(max_new_tokens=5), state=state)[0]
    assert second.tokens == reference([7, 8, *first.tokens, 9], GenerationConfig(max_new_tokens=5))[0]


def test_output_ends_where_the_capacity_does():
    session = ToySession(max_seq_len=10)
    result = generate(session, [[1] * 8], GenerationConfig(max_new_tokens=50))[0]
    assert (len(result.tokens), result.finish_reason) == (3, "length")
    assert session.fed == 10


def test_logprobs_are_of_the_model_and_in_order():
    config = GenerationConfig(max_new_tokens=3, temperature=0.7, top_k=2, repetition_penalty=1.5, logprobs=4)
    result = generate(ToySession(), [[3]], config)[0]
    history = [3]
    for token, logprobs in zip(result.tokens, result.logprobs, strict=True):
        scores = toy_logits(tuple(history)).astype(np.float64)
        expected = scores - np.log(np.exp(scores).sum())
        assert logprobs.chosen == pytest.approx(expected[token], abs=1e-9)
        assert [i for i, _ in logprobs.top] == list(np.argsort(-expected)[:4])
        assert [value for _, value in logprobs.top] == pytest.approx(np.sort(expected)[::-1][:4].tolist(), abs=1e-9)
        history.append(token)


def test_leaving_the_iteration_stops_the_work():
    session = ToySession()
    for event in Generation(session, [[1]], GenerationConfig(max_new_tokens=50)):
        assert event.row == 0
        break
    assert session.fed == 1


def test_timing_is_filled_in():
    result = generate(ToySession(), [[1]], GenerationConfig(max_new_tokens=5))[0]
    assert result.time_to_first_token_s > 0
    assert result.decode_tokens_per_s > 0
    assert generate(ToySession(), [[1]], GenerationConfig(max_new_tokens=1))[0].decode_tokens_per_s is None


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt"),
        ([[1], []], "prompt 1 is empty"),
        ([[1] * 65], "prompt 0 has 65 tokens, but the engine holds at most 64"),
        ([[1, VOCAB]], f"prompt 0 has token {VOCAB}, but the vocabulary is 0 to {VOCAB - 1}"),
        ([[-1]], "prompt 0 has token -1"),
        ([[1], [1.5]], "prompt 1 must be a list of token ids"),
        (["text"], "prompt 0 must be a list of token ids"),
        ([1, 2], "prompt 0 must be a list of token ids"),
        ([[1]] * 9, "9 prompts are more than the engine's batch size of 8"),
    ],
)
def test_refused_prompts(prompts, message):
    session = ToySession()
    with pytest.raises(GenerationError, match=message) as caught:
        generate(session, prompts)
    assert caught.value.exit_code == 2
    assert session.fed == 0


def test_a_prompt_that_no_longer_fits_its_state_is_refused():
    session = ToySession()
    state = session.new_state(1)
    generate(session, [[1] * 60], GenerationConfig(max_new_tokens=1), state=state)
    with pytest.raises(GenerationError, match="prompt 0 has 5 tokens after the 60 tokens that its state holds"):
        generate(session, [[1] * 5], state=state)


def test_stop_strings_without_a_tokenizer_are_refused():
    with pytest.raises(GenerationError, match="stop strings need a tokenizer"):
        generate(ToySession(), [[1]], GenerationConfig(stop_strings=["x"]))


def test_nan_logits_are_an_error_not_a_token():
    class Broken(ToySession):
        def prefill(self, prompts, state, chunk=None):
            return np.full((len(prompts), VOCAB), np.nan, np.float32)

    with pytest.raises(GenerationError, match="not finite") as caught:
        generate(Broken(), [[1]])
    assert caught.value.exit_code == 1
