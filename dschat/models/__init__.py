"""Every model is loaded here. transformers' bars of loading and saving go to the log of a run."""

from transformers.utils import logging as transformers_logging

from dschat.console.chatter import bar_in_log

transformers_logging.set_tqdm_hook(bar_in_log)
