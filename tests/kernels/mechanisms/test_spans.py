import pytest

from farspan.kernels.mechanisms.spans import Spans


def test_spans_follow_the_elastic_rule_in_whole_blocks() -> None:
    spans = Spans(alpha=(-1024.0, 0.0, 0.0, -500.0, 100.0), beta=(0.875, 0.125, 0.5, 0.0, 0.0), length=8192)
    assert spans.attention_mask().window == (6144, 1024, 4096, 64, 64)
    assert spans.attention_mask().sinks == 64


def test_parts_of_a_span_are_rounded_before_they_are_added() -> None:
    """floor(100 / 64) + 0.125 * floor(800 / 64) is 2.5 blocks; 100 + 0.125 * 800 tokens would be 3."""
    assert Spans(alpha=(100.0,), beta=(0.125,), length=800).attention_mask().window == (128,)
    assert Spans(alpha=(1000.0,), beta=(0.1,), length=4096).attention_mask().window == (21 * 64,)


def test_both_options_are_for_the_same_heads() -> None:
    with pytest.raises(ValueError, match="alpha has 2 heads and beta 1"):
        Spans(alpha=(1.0, 2.0), beta=(0.0,), length=10)
