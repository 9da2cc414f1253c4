"""The training stages: pretrain, SFT, DPO, and the functions they share."""
