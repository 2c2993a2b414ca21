import pytest

from dschat.arguments import parse_arguments
from dschat.supervised.settings import SupervisedSettings


@pytest.mark.parametrize("step", ["sft", "reward", "dpo"])
def test_the_settings_are_the_groups_that_the_steps_have_in_common(step):
    args = parse_arguments(step, ["--model_name_or_path=m", "--seed=5", "--num_train_epochs=3"])
    settings = SupervisedSettings.of(args)
    assert settings.description.step == step
    assert (settings.model, settings.batch) == (args.model, args.batch)
    assert (settings.optimizer, settings.tokenizer) == (args.optimizer, args.tokenizer)
    assert (settings.run, settings.run.seed, settings.optimizer.num_train_epochs) == (args.run, 5, 3)
