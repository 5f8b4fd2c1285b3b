"""Ways to run the same RunSpecs; finished ones are skipped in all of them."""
