#!/bin/sh
# Download the game music and the sound font as Debian packages and unpack them below data/.
# Needs apt-get and dpkg (Debian or Ubuntu); nothing is installed. What is there is kept.
set -eu
data=${1:-data}
mkdir -p "$data/debs" "$data/extracted"
for package in wesnoth-1.16-music planetblupi-music-ogg hyperrogue-music \
    extremetuxracer-data lincity-ng-data fluid-soundfont-gm; do
    if ! ls "$data/debs/${package}_"*.deb >/dev/null 2>&1; then
        (cd "$data/debs" && apt-get download "$package")
    fi
    if [ ! -d "$data/extracted/$package" ]; then
        rm -rf "$data/extracted/$package.part"
        dpkg -x "$data/debs/${package}_"*.deb "$data/extracted/$package.part"
        mv "$data/extracted/$package.part" "$data/extracted/$package"
    fi
    echo "$package: $data/extracted/$package/usr/share/doc/$package/copyright"
done
