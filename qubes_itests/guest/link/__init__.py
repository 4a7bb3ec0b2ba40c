"""Link to a guest: the agent's protocol, streams, and processes in the guest."""
