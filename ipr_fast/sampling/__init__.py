"""The algorithm in the paper's terms: patches, schedule, flow, policies, and the reference that defines it."""
