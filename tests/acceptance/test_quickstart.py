"""The quickstart on an undisturbed stack."""

from tests.acceptance.quickstart import Ended


def test_the_quickstart_learns_and_exits_with_0(undisturbed: Ended) -> None:
    assert undisturbed.exit_code == 0, undisturbed.output
    losses = undisturbed.learnt["losses"]
    assert losses[-1] < losses[0] / 5
    assert len(undisturbed.learnt["samples"]) == 7
