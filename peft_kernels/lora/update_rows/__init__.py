"""``lora_update_rows``: the update of a given y by several adapters, each on the rows that use it."""
