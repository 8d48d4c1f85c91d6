"""What is optimised: each task turns a micro-batch into a loss sum and a token count."""
