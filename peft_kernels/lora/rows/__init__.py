"""``lora_rows``: updates of several adapters, each on the rows that use it; what ``rows=`` of the others runs."""
