"""Images of guests: kernels, initramfs and root filesystems."""
