/* The network of a guest, as the host has root set it up: one program in place of many. */
#include "agent.h"

#include <arpa/inet.h>
#include <linux/fib_rules.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <time.h>

/* The table for what comes from clients: it leads to the uplink and nowhere else, whatever
 * routes to other clients the main table has. */
enum { TABLE = 137, RULE_PRIORITY = 100, LAST_METRIC = 1000 };

static int kernel; /* the socket on which it is asked */
static struct {
	struct nlmsghdr header;
	uint8_t body[496];
} request;

static void begin(uint16_t type, int flags, const void *body, size_t size)
{
	memset(&request, 0, sizeof request);
	request.header = (struct nlmsghdr){
		.nlmsg_len = (uint32_t)NLMSG_LENGTH(size),
		.nlmsg_type = type,
		.nlmsg_flags = (uint16_t)(NLM_F_REQUEST | NLM_F_ACK | flags)};
	memcpy(request.body, body, size);
}

static void add(uint16_t type, const void *data, size_t size)
{
	struct rtattr attribute = {.rta_len = (uint16_t)RTA_LENGTH(size), .rta_type = type};
	size_t place = NLMSG_ALIGN(request.header.nlmsg_len) - NLMSG_HDRLEN;

	memcpy(request.body + place, &attribute, sizeof attribute);
	memcpy(request.body + place + RTA_LENGTH(0), data, size);
	request.header.nlmsg_len = (uint32_t)(NLMSG_HDRLEN + place + RTA_LENGTH(size));
}

static bool failed(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	return false;
}

/* Whether the kernel has done it; errno says why not. */
static bool asked(void)
{
	struct {
		struct nlmsghdr header;
		struct nlmsgerr error;
		uint8_t rest[512];
	} answer = {.error.error = -EPROTO};

	if (send(kernel, &request, request.header.nlmsg_len, 0) < 0 ||
	    recv(kernel, &answer, sizeof answer, 0) < 0)
		return false;
	errno = -answer.error.error;
	return errno == 0;
}

static bool write_setting(const char *name, const char *what, const char *value)
{
	char path[PATH_LIMIT];
	bool written;
	int fd;

	snprintf(path, sizeof path, "/proc/sys/net/%s%s", name, what);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return failed(path);
	written = write(fd, value, strlen(value)) > 0 || failed(path);
	close(fd);
	return written;
}

/* By its hardware address, for a guest may call it what it likes. */
static bool find_interface(const char *mac, char name[IF_NAMESIZE])
{
	DIR *directory = opendir("/sys/class/net");
	const struct dirent *entry;
	char path[PATH_LIMIT], address[64];
	bool found = false;

	while (directory && !found && (entry = readdir(directory))) {
		snprintf(path, sizeof path, "/sys/class/net/%s/address", entry->d_name);
		read_file(path, address, sizeof address);
		address[strcspn(address, "\n")] = '\0';
		found = strcmp(address, mac) == 0;
		if (found)
			snprintf(name, IF_NAMESIZE, "%.*s", IF_NAMESIZE - 1, entry->d_name);
	}
	if (directory)
		closedir(directory);
	return found;
}

static bool switch_link(int index, bool up)
{
	struct ifinfomsg link = {.ifi_index = index, .ifi_change = IFF_UP,
	                         .ifi_flags = up ? IFF_UP : 0};

	begin(RTM_NEWLINK, 0, &link, sizeof link);
	return asked();
}

static bool rename_link(int index, const char *name)
{
	struct ifinfomsg link = {.ifi_index = index};

	begin(RTM_NEWLINK, 0, &link, sizeof link);
	add(IFLA_IFNAME, name, strlen(name) + 1);
	return asked();
}

static bool add_address(int index, struct in_addr own)
{
	struct ifaddrmsg address = {.ifa_family = AF_INET, .ifa_prefixlen = 32,
	                            .ifa_index = (uint32_t)index};

	begin(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, &address, sizeof address);
	add(IFA_LOCAL, &own, sizeof own);
	add(IFA_ADDRESS, &own, sizeof own);
	return asked();
}

/* Waits for the interface, which is plugged in meanwhile, and gives it name and address. */
static int set_up_interface(const char *name, const char *mac, const char *address)
{
	const struct timespec pause = {.tv_nsec = 20000000};
	char present[IF_NAMESIZE], setting[PATH_LIMIT];
	struct in_addr own;
	int index;

	while (!find_interface(mac, present))
		nanosleep(&pause, NULL);
	index = (int)if_nametoindex(present);
	if (strcmp(present, name) != 0 &&
	    (!switch_link(index, false) || !rename_link(index, name)))
		return failed(present);
	snprintf(setting, sizeof setting, "/proc/sys/net/ipv6/conf/%s", name);
	if (access(setting, F_OK) == 0 &&
	    !write_setting(setting + strlen("/proc/sys/net/"), "/disable_ipv6", "1"))
		return 0;
	if (inet_pton(AF_INET, address, &own) != 1 || !add_address(index, own) ||
	    !switch_link(index, true))
		return failed(name);
	return index;
}

enum change {
	ADD = NLM_F_CREATE | NLM_F_EXCL,
	REPLACE = NLM_F_CREATE | NLM_F_REPLACE,
	REMOVE = 0,
};

/* To a destination, NULL for all; by way of a gateway on the same wire, NULL for none. */
static bool change_route(enum change change, uint8_t table, int index,
                         const struct in_addr *destination, const struct in_addr *gateway)
{
	/* What is removed may be of any scope. */
	uint8_t scope = change == REMOVE ? RT_SCOPE_NOWHERE : RT_SCOPE_LINK;
	struct rtmsg route = {.rtm_family = AF_INET,
	                      .rtm_dst_len = destination ? 32 : 0,
	                      .rtm_table = table,
	                      .rtm_protocol = RTPROT_BOOT,
	                      .rtm_scope = gateway ? RT_SCOPE_UNIVERSE : scope,
	                      .rtm_type = RTN_UNICAST,
	                      .rtm_flags = gateway ? RTNH_F_ONLINK : 0};

	begin(change == REMOVE ? RTM_DELROUTE : RTM_NEWROUTE, (int)change, &route,
	      sizeof route);
	if (destination)
		add(RTA_DST, destination, sizeof *destination);
	if (gateway)
		add(RTA_GATEWAY, gateway, sizeof *gateway);
	add(RTA_OIF, &index, sizeof index);
	return asked();
}

static bool write_name_servers(char *const *servers)
{
	static const char path[] = "/etc/resolv.conf";
	FILE *file;

	/* What cannot be written to is somebody else's. */
	if (access(path, W_OK) != 0 && access(path, F_OK) == 0)
		return true;
	file = fopen(path, "we");
	if (!file)
		return failed(path);
	for (; *servers; servers++)
		fprintf(file, "nameserver %s\n", *servers);
	return fclose(file) == 0 || failed(path);
}

/* NAME MAC ADDRESS GATEWAY [NAMESERVER]... */
static bool set_up_uplink(char *const *words)
{
	int index = set_up_interface(words[0], words[1], words[2]);
	struct in_addr gateway;

	if (index == 0)
		return false;
	if (inet_pton(AF_INET, words[3], &gateway) != 1 ||
	    !change_route(ADD, RT_TABLE_MAIN, index, &gateway, NULL) ||
	    !change_route(ADD, RT_TABLE_MAIN, index, NULL, &gateway) ||
	    !change_route(REPLACE, TABLE, index, NULL, &gateway))
		return failed(words[3]);
	return write_name_servers(words + 4);
}

/* Clients reach the uplink, if there is one. */
static bool separate_clients(const char *name)
{
	struct rtmsg route = {.rtm_family = AF_INET, .rtm_table = TABLE,
	                      .rtm_protocol = RTPROT_BOOT, .rtm_type = RTN_UNREACHABLE};
	struct fib_rule_hdr rule = {.family = AF_INET, .table = TABLE,
	                            .action = FR_ACT_TO_TBL};
	const uint32_t metric = LAST_METRIC, priority = RULE_PRIORITY;

	begin(RTM_NEWROUTE, ADD, &route, sizeof route);
	add(RTA_PRIORITY, &metric, sizeof metric);
	if (!asked())
		return false;
	begin(RTM_NEWRULE, ADD, &rule, sizeof rule);
	add(FRA_IIFNAME, name, strlen(name) + 1);
	add(FRA_PRIORITY, &priority, sizeof priority);
	return asked();
}

/* NAME MAC ADDRESS */
static bool set_up_downlink(char *const *words)
{
	char own[NAME_LIMIT];

	if (set_up_interface(words[0], words[1], words[2]) == 0)
		return false;
	if (!separate_clients(words[0]))
		return failed(words[0]);
	snprintf(own, sizeof own, "ipv4/conf/%.32s", words[0]);
	return write_setting("ipv4/conf/all", "/rp_filter", "1") &&
	       write_setting(own, "/rp_filter", "1") &&
	       write_setting("ipv4/conf/all", "/send_redirects", "0") &&
	       write_setting(own, "/send_redirects", "0") &&
	       write_setting("ipv4/ip_forward", "", "1");
}

/* NAME, and for each route -DESTINATION, DESTINATION or DESTINATION/VIA: to be removed, a
 * client's own, or one behind it. */
static bool change_routes(char *const *words)
{
	int index = (int)if_nametoindex(words[0]);
	struct in_addr destination, via;

	for (words++; index && *words; words++) {
		bool gone = **words == '-';
		char *start = *words + gone, *slash = strchr(start, '/');

		if (slash)
			*slash++ = '\0';
		if (inet_pton(AF_INET, start, &destination) != 1 ||
		    (slash && inet_pton(AF_INET, slash, &via) != 1))
			return failed(start);
		if (gone) {
			/* One may have gone with its gateway. */
			change_route(REMOVE, RT_TABLE_MAIN, index, &destination, NULL);
		} else if (!change_route(REPLACE, RT_TABLE_MAIN, index, &destination,
		                         slash ? &via : NULL)) {
			return failed(start);
		}
	}
	return index || failed("the interface");
}

int network_main(int argc, char **argv)
{
	kernel = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
	if (strcmp(argv[1], "uplink") == 0 && argc >= 6)
		return set_up_uplink(argv + 2) ? 0 : 1;
	if (strcmp(argv[1], "downlink") == 0 && argc == 5)
		return set_up_downlink(argv + 2) ? 0 : 1;
	if (strcmp(argv[1], "routes") == 0 && argc >= 3)
		return change_routes(argv + 2) ? 0 : 1;
	fputs("agent: no such request for the network\n", stderr);
	return 2;
}
