"""The grid of `saddle benchmark regularizers`: independent cells, who works on them, and the report on them."""
