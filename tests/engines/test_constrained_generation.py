"""Generation under a constraint and with biases, on logits that are known."""

from __future__ import annotations

import numpy as np
import pytest

from engines.generation import ConstraintError, GenerationConfig, GenerationError
from engines.generation.generate import Row, check_bias
from engines.generation.sampling import Sampler

VOCABULARY = 7
LOGITS_N = np.array([0.0, 3.0, 1.0, 2.0, -1.0, 0.5, -2.0], np.float32)


class OneOf:
    """Allows exactly these answers."""

    def __init__(self, *answers):
        self.answers, self.past = answers, ()

    def allowed(self):
        allowed_N = np.zeros(VOCABULARY, bool)
        rest = [answer[len(self.past) :] for answer in self.answers if answer[: len(self.past)] == self.past]
        allowed_N[[answer[0] for answer in rest if answer]] = True
        return allowed_N, () in rest

    def accept(self, token):
        self.past += (token,)


def run(config, steps=20):
    row = Row(0, [1], config, VOCABULARY, None)
    for _ in range(steps):
        row.step(LOGITS_N)
        if row.finish_reason is not None:
            return row.result(0.0)
    raise AssertionError("no end")


def constrained(*answers, **settings):
    return GenerationConfig(constraint=lambda: OneOf(*answers), **settings)


def test_the_likeliest_allowed_token_is_taken_and_the_end_only_where_it_may_be():
    result = run(constrained((2, 0), (0, 4, 4), stop_token_ids=(1,)))  # 1 is the likeliest everywhere
    assert (result.tokens, result.finish_reason, result.stop_reason) == ([2, 0], "stop", 1)


def test_an_answer_that_may_end_and_may_go_on_does_either():
    ends = run(constrained((2,), (2, 3), stop_token_ids=(1,)))
    goes_on = run(constrained((2,), (2, 3), stop_token_ids=(6,)))
    assert (ends.tokens, goes_on.tokens) == ([2], [2, 3])


def test_without_a_stop_token_it_ends_when_nothing_can_follow():
    result = run(constrained((2,), (2, 3, 3)))
    assert (result.tokens, result.finish_reason, result.stop_reason) == ([2, 3, 3], "stop", None)


def test_it_is_cut_at_the_limit():
    assert run(constrained((2, 3, 3), max_new_tokens=2, stop_token_ids=(1,))).finish_reason == "length"


def test_a_token_that_is_both_text_and_the_stop_token_stops():
    result = run(constrained((1, 2), (5,), stop_token_ids=(1, 99)))
    assert (result.tokens, result.stop_reason) == ([5], 1)


@pytest.mark.parametrize("settings", [{}, {"temperature": 3.0}, {"temperature": 3.0, "top_p": 0.3}, {"top_k": 1}])
def test_only_allowed_tokens_are_drawn(settings):
    seen = {tuple(run(constrained((0, 2), (6, 4), (6, 3), seed=seed, **settings)).tokens) for seed in range(60)}
    drawn = settings.get("temperature", 0) > 0 and "top_p" not in settings
    assert seen == ({(0, 2), (6, 4), (6, 3)} if drawn else {(0, 2)})


def test_each_answer_has_a_constraint_of_its_own():
    config = constrained((2, 0), stop_token_ids=(1,))
    assert run(config).tokens == run(config).tokens == [2, 0]


def test_log_probabilities_are_of_the_engines_own_logits():
    result = run(constrained((6, 4), logprobs=1, logit_bias={4: 50.0}, stop_token_ids=(1,)))
    expected_N = LOGITS_N.astype(float) - np.log(np.exp(LOGITS_N.astype(float)).sum())
    assert [entry.chosen for entry in result.logprobs] == pytest.approx([expected_N[6], expected_N[4]])
    assert [entry.top[0][0] for entry in result.logprobs] == [1, 1]


def test_nothing_allowed_is_an_error_of_the_constraint():
    with pytest.raises(ConstraintError, match="no token can follow"):
        run(constrained(stop_token_ids=(1,)))


def test_an_engine_that_rules_out_all_that_is_allowed():
    logits_N = np.array([0.0, -np.inf, -np.inf])
    with pytest.raises(ConstraintError, match="no token can follow"):
        Sampler(GenerationConfig(), 3, []).sample(logits_N, np.array([False, True, True]))


def test_a_bias_is_added_before_the_penalties():
    biased = GenerationConfig(max_new_tokens=3, logit_bias={4: 5.0, 1: -100.0}, repetition_penalty=4.0)
    # 4 comes to 4 and, once seen, to 1; then 3 at 2, and once seen at 0.5; then 4 and 2 at 1.
    assert run(biased).tokens == [4, 3, 2]
    assert run(GenerationConfig(max_new_tokens=1, logit_bias=((6, 100),))).tokens == [6]


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({3: 101}, "a value of logit_bias must be a number of at least -100 and at most 100, not 101"),
        ({-1: 1}, "a token of logit_bias must be a whole number"),
        ({"3": 1}, "a token of logit_bias must be a whole number"),
        ([1, 2], "logit_bias must give tokens numbers"),
        (4, "logit_bias must give tokens numbers"),
        ({3: float("nan")}, "a value of logit_bias must be a number"),
    ],
)
def test_refused_biases(bias, message):
    with pytest.raises(GenerationError, match=message):
        GenerationConfig(logit_bias=bias)


def test_a_bias_of_a_token_that_there_is_not():
    with pytest.raises(GenerationError, match="logit_bias has token 7, but the vocabulary is 0 to 6"):
        check_bias(GenerationConfig(logit_bias={7: 1.0}), VOCABULARY)
