"""The basement: what every kernel family stands on. Nothing here knows a family."""
