"""How good a model folder is: FID, KID, CLIP score, GenEval and MJHQ-30K, speed; one table and one contact sheet."""
