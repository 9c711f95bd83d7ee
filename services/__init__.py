"""Four services that sell, reserve, charge and ship, a fifth that counts, and a demo that runs them on real orders."""
