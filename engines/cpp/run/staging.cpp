#include "staging.h"

#include <cerrno>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <system_error>

#include "sha256.h"

#ifndef _WIN32
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace fs = std::filesystem;

namespace {

const std::string prefix = ".higen-";
const std::string note =
    "higen writes here. The next run that writes beside this folder removes it if its owner is gone.\n";
constexpr std::size_t random_digits = 12, digest_digits = 8;
constexpr int tries = 1000;

// A folder's name: random digits and their digest. higen recognises its folders by it.
std::string named(const std::string& token) {
    higen::core::Sha256 hash;
    const auto text = prefix + token;
    hash.update(text.data(), text.size());
    return text + hash.hex().substr(0, digest_digits);
}

std::string random_token() {
    std::random_device random;
    std::string token;
    while (token.size() < random_digits) token += "0123456789abcdef"[random() % 16];
    return token;
}

bool is_ours(const std::string& name) {
    return name.size() == prefix.size() + random_digits + digest_digits && name.compare(0, prefix.size(), prefix) == 0 &&
           named(name.substr(prefix.size(), random_digits)) == name;
}

#ifndef _WIN32

bool is_still(const fs::path& path, int descriptor) {
    struct stat there = {}, held = {};
    return lstat(path.c_str(), &there) == 0 && fstat(descriptor, &held) == 0 && there.st_dev == held.st_dev &&
           there.st_ino == held.st_ino;
}

// Locks a folder until the process ends; returns -1 if it cannot be locked.
int hold(const fs::path& path, bool wait) {
    const int descriptor = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (descriptor < 0) return -1;
    int status = -1;
    do status = flock(descriptor, LOCK_EX | (wait ? 0 : LOCK_NB));
    while (status != 0 && errno == EINTR);
    if (status == 0 && is_still(path, descriptor)) return descriptor;
    close(descriptor);
    return -1;
}

void let_go(int descriptor) {
    if (descriptor >= 0) close(descriptor);
}

#else

int hold(const fs::path&, bool) { return -1; }

void let_go(int) {}

#endif

// Whether the note is higen's, or the first part of one, left by a killed writer.
bool has_note(const fs::path& root) {
    if (!fs::exists(root / "note")) return fs::is_empty(root);
    std::ifstream file(root / "note", std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    return text.size() <= note.size() && note.compare(0, text.size(), text) == 0;
}

// Removes folders of killed writers. A folder with a journal is kept: higen's Python programs finish its change.
void sweep(const fs::path& parent) {
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(parent, error)) {
        if (!is_ours(entry.path().filename().u8string())) continue;
        const int lock = hold(entry.path(), false);
        if (lock < 0) continue;
        try {
            if (has_note(entry.path()) && !fs::exists(entry.path() / "journal")) fs::remove_all(entry.path());
        } catch (const fs::filesystem_error&) {  // skip a folder that cannot be removed
        }
        let_go(lock);
    }
}

}  // namespace

Staging::Staging(const fs::path& parent) {
    sweep(parent);
    for (int i = 0; i < tries && root_.empty(); ++i) {
        const auto made = parent / named(random_token());
        if (!fs::create_directory(made)) continue;
        lock_ = hold(made, true);
        if (fs::exists(made)) root_ = made;  // else another writer removed it before it was locked
    }
    if (root_.empty())
        throw fs::filesystem_error("no folder can be made", parent, std::make_error_code(std::errc::device_or_resource_busy));
    std::ofstream(root_ / "note", std::ios::binary) << note;
    fs::create_directory(folder());
}

Staging::~Staging() {
    std::error_code error;
    fs::remove_all(root_, error);
    let_go(lock_);
}
