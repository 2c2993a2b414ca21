"""DeepSpeed-Chat's import path of the DeepSpeed configurations."""

from dschat.engines.deepspeed_config import get_eval_ds_config, get_train_ds_config

__all__ = ["get_eval_ds_config", "get_train_ds_config"]
