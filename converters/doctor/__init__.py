"""What this machine has: versions, memory, disks, devices, settings. Of what it reports on, only torch is imported."""
