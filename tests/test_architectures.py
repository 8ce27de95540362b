"""The census on a representative set of model types; ``make census`` takes all of them."""

import pytest
from census.checks import LeftOut, Outcome, check, check_reloaded, make_model
from census.population import model_types
from census.run import run_census
from census.table import totals, write_table

ENCODERS = [
    *("albert", "bert", "big_bird", "canine", "convbert", "deberta", "deberta-v2", "distilbert", "electra", "fnet"),
    *("longformer", "modernbert", "mpnet", "nystromformer", "reformer", "roformer", "xlm", "xlm-roberta", "xlnet"),
]
DECODERS = [
    *("bloom", "falcon", "gemma2", "gemma3_text", "gemma3n_text", "gpt2", "gpt_neo", "gpt_neox", "llama", "mpt"),
    *("nanochat", "olmo2", "opt", "phi3", "qwen3"),
]
ENCODER_DECODERS = ["bart", "mt5", "pegasus", "prophetnet", "t5", "t5gemma"]
EXPERTS = ["deepseek_v3", "gpt_oss", "longcat_flash", "mixtral", "qwen2_moe", "switch_transformers"]
STATE_SPACES = ["bamba", "falcon_h1", "jamba", "mamba", "mamba2", "qwen3_next", "recurrent_gemma", "rwkv", "zamba2"]
MULTIMODAL = ["gemma3", "llama4", "qwen3_5"]
REPRESENTATIVE = [*ENCODERS, *DECODERS, *ENCODER_DECODERS, *EXPERTS, *STATE_SPACES, *MULTIMODAL]


@pytest.mark.parametrize("model_type", [name for name in REPRESENTATIVE if name in model_types()])
def test_all_four_checks(model_type, tmp_path):
    outcome = Outcome(model_type)
    check(outcome, tmp_path)
    assert outcome.failed == {}
    assert outcome.passed == [1, 2, 3, 4]
    check_reloaded(tmp_path)


def test_the_set_is_of_the_population():
    assert len(set(REPRESENTATIVE) & set(model_types())) >= 40


def test_a_run_in_processes_of_their_own(tmp_path):
    outcomes = run_census(["bert", "jamba", "encoder-decoder", "squeezebert"], tmp_path)
    assert [outcome.passed for outcome in outcomes[:2]] == [[1, 2, 3, 4]] * 2
    assert outcomes[2].left_out == "AutoModel has no class for it"
    assert "Tap hidden.0 was read 0 times" in outcomes[3].failed[1]
    page = tmp_path / "page.md"
    write_table(outcomes, page)
    assert "4 model types" in totals(outcomes)
    assert "3 of them read text and build from a config alone; 2 of those (66.7%) pass" in page.read_text()
    assert "| bert | 5, 4, 0 | all |" in page.read_text()


def test_an_ffn_or_a_norm_that_is_overlooked_fails(monkeypatch, tmp_path):
    monkeypatch.setattr("spin_hf.structure._find_ffn", lambda block, hidden_size: None)
    outcome = Outcome("bert")
    check(outcome, tmp_path)
    assert "no ffn tap in blocks [1, 2, 3, 4], which have no experts" in outcome.failed[1]
    monkeypatch.undo()
    monkeypatch.setattr("spin_hf.structure._final_norm", lambda backbone, blocks: None)
    outcome = Outcome("llama")
    check(outcome, tmp_path)
    assert "1 taps are not transformers' own" in outcome.failed[2]


def test_what_is_left_out():
    for model_type in ("encoder-decoder", "musicgen"):
        with pytest.raises(LeftOut):
            make_model(model_type)
