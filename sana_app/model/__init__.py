"""The model: TrigFlow maths, ControlNet, text, scheduler and pipeline, shared by the page and by training."""
