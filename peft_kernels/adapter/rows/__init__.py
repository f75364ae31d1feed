"""``adapter_rows``: bottleneck adapters, each on its rows; what ``rows=`` of ``bottleneck_adapter`` runs."""
