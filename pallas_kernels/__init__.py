"""Array operations with a contract, a readable reference, and forms for each device. One folder an operation."""
