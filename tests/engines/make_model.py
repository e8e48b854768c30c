"""For the processes of the engines: a model of transformers' own as its folder on the Hub would be."""


def make(kind, arguments, folder):
    """kind: the config's class."""
    import torch
    import transformers

    config = getattr(transformers, kind)(**arguments)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return {}
