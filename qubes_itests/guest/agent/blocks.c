/* Block devices that other VMs may have, told of as udev's rules of Qubes OS do: in
 * qubesdb, below /qubes-block-devices. */
#include "agent.h"

#include <sys/sysmacros.h>

#define BLOCKS "/qubes-block-devices"
#define DEVICES "/sys/class/block"

enum { DESC, SIZE, MODE, PARENT, KEYS };
/* So few that all that is said of them fits the room that a turn of the loop has. */
enum { VALUE_MAX = 256, DEVICES_MAX = 32 };
static const char *const keys[KEYS] = {"desc", "size", "mode", "parent"};

/* What the database says of them. It is not read for that: whatever a user of the guest
 * has put there, a pipe for one, is not waited for. */
static struct block {
	char name[64];
	char values[KEYS][VALUE_MAX];
} told[DEVICES_MAX];

/* Told of changes; there is none before the first device that others may have. */
static int mounts = -1;

int blocks_mounts(void)
{
	return mounts;
}

/* The first line of what the kernel says of a device; false: nothing. */
static bool attribute(const char *device, const char *name, char value[VALUE_MAX])
{
	char path[PATH_LIMIT];

	snprintf(path, sizeof path, DEVICES "/%s/%s", device, name);
	if (read_file(in_root(path), value, VALUE_MAX) < 0)
		return false;
	value[strcspn(value, "\n")] = '\0';
	/* The name of a file may be among it; the host takes nothing but text. */
	for (char *at = value; *at; at++)
		if (*at < ' ' || *at > '~')
			*at = '_';
	return true;
}

/* Whether a table whose lines begin with devices has one of that number. */
static bool listed(const char *table, const char *number)
{
	char line[PATH_LIMIT], device[PATH_LIMIT], found[32] = "";
	FILE *file = fopen(in_root(table), "re");
	struct stat status;

	while (file && strcmp(found, number) != 0 && fgets(line, sizeof line, file))
		if (sscanf(line, "%1023s", device) == 1 && *device == '/' &&
		    stat(device, &status) == 0)
			snprintf(found, sizeof found, "%u:%u", major(status.st_rdev),
			         minor(status.st_rdev));
	if (file)
		fclose(file);
	return strcmp(found, number) == 0;
}

/* Mounted, swapped to, a part of another device; or one of its partitions is. */
static bool is_used(const char *device)
{
	char path[PATH_LIMIT], value[VALUE_MAX];
	const struct dirent *entry;
	DIR *directory;
	bool used = attribute(device, "dev", value) &&
	            (listed("/proc/mounts", value) || listed("/proc/swaps", value));

	snprintf(path, sizeof path, DEVICES "/%s/holders", device);
	directory = opendir(in_root(path));
	while (directory && !used && (entry = readdir(directory)))
		used = entry->d_name[0] != '.';
	if (directory)
		closedir(directory);
	snprintf(path, sizeof path, DEVICES "/%s", device);
	directory = opendir(in_root(path));
	while (directory && !used && (entry = readdir(directory))) {
		snprintf(path, sizeof path, "%.100s/partition", entry->d_name);
		used = entry->d_name[0] != '.' && attribute(device, path, value) &&
		       is_used(entry->d_name);
	}
	if (directory)
		closedir(directory);
	return used;
}

/* What is said of a device; false: nobody is to have it. */
static bool describe(const char *device, char values[KEYS][VALUE_MAX])
{
	char path[PATH_LIMIT], value[VALUE_MAX], place[PATH_LIMIT] = "", *slash;
	const char *whole = device;

	*values[PARENT] = '\0';
	if (attribute(device, "partition", value)) {
		snprintf(path, sizeof path, DEVICES "/%s", device);
		if (readlink(in_root(path), place, sizeof place - 1) < 0)
			return false;
		/* the directory of a partition is in that of its device */
		if ((slash = strrchr(place, '/')))
			*slash = '\0';
		whole = (slash = strrchr(place, '/')) ? slash + 1 : place;
		snprintf(values[PARENT], VALUE_MAX, "%.63s", whole);
	}
	/* A disk of ours is what Xen has as a device of its own driver, and leaves out. One
	 * that is just plugged in has no serial number, and is known by its maker; one that
	 * is just plugged out has not even that. */
	if (disk_is_ours(whole) || strncmp(whole, "zram", 4) == 0 ||
	    (attribute(whole, "device/vendor", value) ? strncmp(value, "QEMU", 4) == 0
	                                              : strncmp(whole, "sd", 2) == 0) ||
	    !attribute(device, "size", value) || strcmp(value, "0") == 0)
		return false;
	if (mounts < 0)
		mounts = open(in_root("/proc/mounts"), O_RDONLY | O_CLOEXEC);
	if (is_used(device))
		return false;
	snprintf(values[SIZE], VALUE_MAX, "%llu", strtoull(value, NULL, 10) * 512);
	snprintf(values[MODE], VALUE_MAX, "%s",
	         attribute(device, "ro", value) && strcmp(value, "1") == 0 ? "r" : "w");
	if (strncmp(device, "loop", 4) == 0 && whole == device)
		return attribute(device, "loop/backing_file", values[DESC]);
	if (attribute(device, "dm/name", values[DESC]))
		return *values[DESC] && strncmp(values[DESC], "snapshot-", 9) != 0 &&
		       strncmp(values[DESC], "origin-", 7) != 0;
	attribute(whole, "device/model", value);
	snprintf(values[DESC], VALUE_MAX, "%.200s ()", value);
	return true;
}

/* Change an entry, also the host's; NULL: there is none. */
static void set(const char *path, const char *value)
{
	char payload[NAME_LIMIT + VALUE_MAX];
	size_t length = strlen(path) + 1;

	db_set(path, value);
	memcpy(payload, path, length);
	if (value) {
		memcpy(payload + length, value, strlen(value) + 1);
		length += strlen(value) + 1;
	}
	if (port_connected())
		send_frame(DB_CHANGED, 0, 0, payload, length);
}

static void tell(const struct block *block, bool removed)
{
	char path[NAME_LIMIT];

	for (int key = 0; key < KEYS; key++) {
		snprintf(path, sizeof path, BLOCKS "/%.63s/%s", block->name, keys[key]);
		set(path, removed ? NULL : block->values[key]);
	}
}

/* Whether all devices have been looked at since this agent began. */
static bool looked;

/* Where nothing has been told, a host that is new has missed nothing. */
void blocks_tell_again(void)
{
	bool told_nothing = looked;

	for (int i = 0; i < DEVICES_MAX; i++)
		told_nothing = told_nothing && !*told[i].name;
	memset(told, 0, sizeof told);
	if (told_nothing)
		disks_settle();
	else
		blocks_update();
}

void blocks_update(void)
{
	struct dirent **names;
	int count = scandir(in_root(DEVICES), &names, NULL, NULL);
	bool changed = false, there[DEVICES_MAX] = {false};

	for (int i = 0; i < count; i++) {
		struct block block = {.name = ""};
		int place = 0;

		snprintf(block.name, sizeof block.name, "%.63s", names[i]->d_name);
		free(names[i]);
		if (*block.name == '.' || !describe(block.name, block.values))
			continue;
		while (place < DEVICES_MAX && strcmp(told[place].name, block.name) != 0)
			place++;
		for (int j = 0; place == DEVICES_MAX && j < DEVICES_MAX; j++)
			place = *told[j].name ? place : j;
		if (place == DEVICES_MAX)
			continue;
		there[place] = true;
		if (memcmp(&told[place], &block, sizeof block) == 0)
			continue;
		told[place] = block;
		tell(&block, false);
		changed = true;
	}
	if (count >= 0)
		free(names);
	looked = true;
	for (int i = 0; i < DEVICES_MAX; i++) {
		if (!*told[i].name || there[i])
			continue;
		tell(&told[i], true);
		*told[i].name = '\0';
		changed = true;
	}
	/* Last, as this is what is watched. */
	if (changed)
		set(BLOCKS, "");
}
