"""Networks small enough for anything."""

TINY = {
    "image_size": 64,
    "hidden_size": 32,
    "depths": [1, 1, 2],
    "num_attention_heads": 4,
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 3,
    "num_labels": 5,
}
