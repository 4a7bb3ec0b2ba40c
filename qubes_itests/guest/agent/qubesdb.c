/* The VM's database: one file for each entry, named by its path with ! for /. */
#include "agent.h"

#include <sys/inotify.h>

static const char *file_of(const char *path)
{
	static char file[PATH_LIMIT];
	int start = snprintf(file, sizeof file, "%s/", in_root(DB_PATH));

	snprintf(file + start, sizeof file - (size_t)start, "%s", path);
	for (char *slash = file + start; (slash = strchr(slash, '/'));)
		*slash = '!';
	return file;
}

static bool path_valid(const char *path)
{
	return *path == '/' && strlen(path) < NAME_LIMIT - 1;
}

/* The guest's own users write here, too: what they have put in our way is not followed. */
bool db_set(const char *path, const char *value)
{
	const char *file = file_of(path);
	char temporary[PATH_LIMIT];
	ssize_t length = value ? (ssize_t)strlen(value) : -1;
	bool written;
	int fd;

	if (!path_valid(path))
		return false;
	if (!value)
		return unlink(file) == 0 || access(file, F_OK) != 0;
	if (mkdir(in_root(DB_PATH), 0777) == 0 && chmod(in_root(DB_PATH), 0777) != 0)
		return false;
	snprintf(temporary, sizeof temporary, "%s/.new-%d", in_root(DB_PATH), (int)getpid());
	unlink(temporary);
	fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
	if (fd < 0)
		return false;
	written = write(fd, value, (size_t)length) == length && fchmod(fd, 0644) == 0;
	close(fd);
	file = file_of(path);
	return (written && rename(temporary, file) == 0) || unlink(temporary) > 0;
}

static bool print_value(const char *path, const char *end)
{
	static char value[65536];

	if (read_file(file_of(path), value, sizeof value) < 0)
		return false;
	printf("%s%s", value, end);
	return true;
}

/* What is below the prefix: paths, with their values or without. */
static void print_below(const char *prefix, bool full, bool values)
{
	struct dirent **entries;
	int count = scandir(in_root(DB_PATH), &entries, NULL, alphasort);

	for (int i = 0; i < count; i++) {
		char *path = entries[i]->d_name;

		for (char *mark = path; (mark = strchr(mark, '!'));)
			*mark = '/';
		if (*path == '/' && strncmp(path, prefix, strlen(prefix)) == 0) {
			printf(values ? "%s = " : "%s\n", path + (full ? 0 : strlen(prefix)));
			if (values)
				print_value(path, "\n");
		}
		free(entries[i]);
	}
	if (count >= 0)
		free(entries);
}

/* Remove an entry; of a path with a slash at its end all that is below it. */
static bool remove_entry(const char *path)
{
	DIR *directory = opendir(in_root(DB_PATH));
	const struct dirent *entry;
	size_t length = strlen(path);
	bool removed = false;

	while (directory && (entry = readdir(directory))) {
		char name[NAME_LIMIT];

		snprintf(name, sizeof name, "%s", entry->d_name);
		for (char *mark = name; (mark = strchr(mark, '!'));)
			*mark = '/';
		if (path[length - 1] == '/' ? strncmp(name, path, length) == 0
		                            : strcmp(name, path) == 0)
			removed = db_set(name, NULL) || removed;
	}
	if (directory)
		closedir(directory);
	return removed;
}

/* Whether a change of an entry fires a watch: of it, or, with a slash, of those below. */
static bool fires(const char *entry, char **watched)
{
	for (; *watched; watched++) {
		size_t length = strlen(*watched);

		if (length && ((*watched)[length - 1] == '/' ? strncmp(entry, *watched, length) == 0
		                                             : strcmp(entry, *watched) == 0))
			return true;
	}
	return false;
}

/* Print the paths of entries that change, until that were so many; below 0: for ever. */
static int watch(char **watched, int count)
{
	union {
		struct inotify_event event;
		char space[16384];
	} buffer;
	int fd = inotify_init1(IN_CLOEXEC);
	ssize_t length;

	if (inotify_add_watch(fd, in_root(DB_PATH), IN_MOVED_TO | IN_DELETE) < 0) {
		fprintf(stderr, "qubesdb-watch: %s: %s\n", DB_PATH, strerror(errno));
		return 1;
	}
	while (count != 0 && (length = read(fd, &buffer, sizeof buffer)) > 0) {
		const struct inotify_event *event;

		for (char *at = buffer.space; at < buffer.space + length && count != 0;
		     at += sizeof *event + event->len) {
			char path[NAME_LIMIT];

			event = (const void *)at;
			snprintf(path, sizeof path, "%s", event->len ? event->name : "");
			for (char *mark = path; (mark = strchr(mark, '!'));)
				*mark = '/';
			if (!fires(path, watched))
				continue;
			printf("%s\n", path);
			fflush(stdout);
			count -= count > 0;
		}
	}
	return count != 0;
}

static int change(char **words, bool writing, bool quiet)
{
	int status = 0;

	for (; *words; words += writing ? 2 : 1) {
		if (**words && (writing ? db_set(words[0], words[1]) : remove_entry(words[0])))
			continue;
		status = 1;
		if (!quiet)
			fprintf(stderr, "qubesdb: %s cannot be %s\n", *words,
			        writing ? "written" : "removed");
	}
	return status;
}

/* read PATH: its value.  list [PREFIX], multiread PREFIX: what is below it.
 * write PATH VALUE…, rm PATH…: change it.  watch [-n COUNT] PATH…: tell of changes. */
int qubesdb_main(int argc, char **argv, const char *command)
{
	bool read = strcmp(command, "read") == 0, list = strcmp(command, "list") == 0;
	bool writing = strcmp(command, "write") == 0, watching = strcmp(command, "watch") == 0;
	bool full = false, raw = false, quiet = false, valid = true;
	const char *path;
	int option, count = 1;

	while ((option = getopt(argc, argv, watching ? "n:frq" : "frq")) != -1) {
		full = full || option == 'f';
		raw = raw || option == 'r';
		quiet = quiet || option == 'q';
		count = option == 'n' ? atoi(optarg) : count;
		valid = valid && option != '?';
	}
	path = optind < argc ? argv[optind] : list ? "/" : NULL;
	valid = valid && path && !(writing && (argc - optind) % 2);
	if (valid && watching)
		return watch(argv + optind, count);
	if (valid && (writing || strcmp(command, "rm") == 0))
		return change(argv + optind, writing, quiet);
	if (!valid || (!read && !list && strcmp(command, "multiread") != 0)) {
		fputs("usage: qubesdb-{read,list,multiread} [-f] [-r] PATH\n"
		      "       qubesdb-write [-q] {PATH VALUE}...\n"
		      "       qubesdb-rm [-q] PATH...\n"
		      "       qubesdb-watch [-n COUNT] PATH...\n", stderr);
		return 2;
	}
	if (read)
		return print_value(path, raw ? "" : "\n") ? 0 : 1;
	print_below(path, full, !list);
	return 0;
}
