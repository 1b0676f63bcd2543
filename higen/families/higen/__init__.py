"""The HiGen family (CVPR 2024): a key frame is drawn first, then a clip around it, by one U-Net."""
