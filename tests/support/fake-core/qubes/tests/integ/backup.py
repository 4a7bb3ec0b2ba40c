"""A suite that reads whole volumes."""

import unittest

import qubes.config
from qubes.vm.appvm import AppVM


class TC_00_Backup(unittest.TestCase):
    def test_000_volumes_are_small(self):
        self.assertEqual(
            qubes.config.defaults,
            {"private_img_size": 256 << 20, "root_img_size": 2 << 30},
        )
        self.assertEqual(AppVM.default_volume_config["private"]["size"], 256 << 20)
