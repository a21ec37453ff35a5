"""Training: data, loops and pictures over the reference models."""
