"""dschat: staged RLHF (SFT, reward model, PPO) on plain DeepSpeed and Hugging Face transformers."""
