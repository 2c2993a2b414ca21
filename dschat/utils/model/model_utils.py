"""DeepSpeed-Chat's import path of the model builders."""

from dschat.models.loading import create_critic_model, create_hf_model

__all__ = ["create_critic_model", "create_hf_model"]
