"""Paper planning: does a model fit a machine, and how fast can it be there at best. Needs no weights and no GPU."""
