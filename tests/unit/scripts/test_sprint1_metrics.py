from devtools.sprint1_metrics import BLOCK, RESULTS


def test_the_results_have_a_place_for_the_table() -> None:
    assert len(BLOCK.findall(RESULTS.read_text())) == 1
