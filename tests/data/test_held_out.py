"""What a run's steps held out is found again, as text, from what the run recorded."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import save_counting_pairs, tiny_tokenizer, values_of

from dschat.arguments import DataArguments
from dschat.data.comparisons import prompt_key
from dschat.data.held_out import RecordedData, SplitText
from dschat.data.preparation import prompt_data, reward_data
from dschat.errors import UserError


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run of step 3: its record, and its actor's folder."""
    save_counting_pairs(tmp_path / "pairs.jsonl")
    data = {"data_path": [str(tmp_path / "pairs.jsonl")], "eval_fraction": 0.2, "data_split": "1,1,1"}
    data |= {"a_flag_of_later": 1}
    folder = tmp_path / "ppo"
    (folder / "actor").mkdir(parents=True)
    (folder / "arguments.json").write_text(json.dumps({"data": data, "run": {"seed": 7}}))
    return folder


def test_the_prompts_are_those_that_steps_2_and_3_hold_out(run, tmp_path):
    recorded = RecordedData.of(str(run / "actor"))
    assert (recorded.seed, recorded.data.eval_fraction) == (7, 0.2)
    split = SplitText.of_run(recorded)
    prompts = split.prompts(split.held_out())
    tokenizer, cache = tiny_tokenizer(), str(tmp_path / "cache")
    data = DataArguments(**{**vars(recorded.data), "data_output_path": cache})
    of_step_3 = prompt_data(data, tokenizer, max_prompt_seq_len=99, seed=7)
    assert sorted(prompts) == sorted(map(tokenizer.decode, values_of(of_step_3.evaluation)))
    assert len(prompts) == 12  # of sixty
    pairs = reward_data(data, tokenizer, max_seq_len=99, seed=7).evaluation
    assert len(pairs) == 12
    trained = [tokenizer.decode(ids) for ids in values_of(of_step_3.train)]
    keys = np.array([prompt_key(prompt) for prompt in [*prompts, *trained]], dtype=np.uint64)
    assert split.num_trained_on(keys) == len(trained) > 10


def test_other_data_is_held_out_whole(run):
    split = SplitText.of_entries([str(run.parent / "pairs.jsonl")], "--data")
    assert len(split.held_out()) == 60
    assert split.num_trained_on(split.index.keys) == 0
    assert json.loads(split.rows[0]["row"])["chosen"] == " two three"
    assert split.names == (str(run.parent / "pairs.jsonl"),)


def test_what_is_not_recorded_or_is_gone_is_said(run):
    assert RecordedData.of(str(run.parent)) is None
    assert RecordedData.of("a/hub-id") is None
    (run.parent / "pairs.jsonl").unlink()
    with pytest.raises(UserError, match=r"the data that .*arguments.json names cannot be read: --data_path"):
        SplitText.of_run(RecordedData.of(str(run)))
    (run / "arguments.json").write_text("[]")
    with pytest.raises(UserError, match=r"arguments.json does not say what data its run had"):
        RecordedData.of(str(run))
