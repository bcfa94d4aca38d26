"""One file for every cause that the suite knows; `lightning_spike.diagnosis.catalogue` finds them."""
