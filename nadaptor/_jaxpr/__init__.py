"""What a traced function says: its operations, marks, and what each may do to spikes."""
