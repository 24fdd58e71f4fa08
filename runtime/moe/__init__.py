"""The mixture of experts: router, dispatcher, experts, runner."""
