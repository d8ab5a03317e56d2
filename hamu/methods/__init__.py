"""What an unlearning method is: objectives, a combine rule (Gram in, weights out), and nothing about loops or processes."""
