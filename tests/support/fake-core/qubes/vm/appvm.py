"""A class that looks up how large its volumes are as it is made."""

from qubes.config import defaults


class AppVM:
    default_volume_config = {"private": {"size": defaults["private_img_size"]}}  # noqa: RUF012
