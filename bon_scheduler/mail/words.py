"""
Words that mail servers say of mail in general, in English: what is kept of their answers (`replies.clean_reply`).

Whoever misses one in a reply adds it here; no name of a person, a business or a product that tenants have belongs here.
"""

__all__ = ["WORDS"]

WORDS = frozenset(
    """
    a about accept accepted accepting access account action address addresses after again all allocate allowed an
    and another anti any are as ask at attachment attachments attempt attempts auth authenticate authenticated
    authentication authorized available awaiting back backend bad banned be because been before being blacklist
    blacklisted block blocked blocklist blocklisted body bounce bulk busy but by bye cannot certificate change
    channel check client close closed closing code command commands completed conditions configuration configured
    connect connected connecting connection connections contact contain contained contains content could credentials
    daily data database day days decline declined defer deferred delay delayed delete deliver delivered delivering
    delivery denied detected dkim dmarc dns dnsbl dnsrbl does domain domains down due duplicate during early
    encryption ended enough error errors esmtp etrn exceed exceeded exceeds exchange exist existing exists expected
    expired external fail failed failing failure false few file filter final find first for forbidden format found
    free from full further general generic go goodbye got graylisted greylist greylisted greylisting has hash have
    header headers hello helo help here high hold host hostname hour hourly hours however http https identity if
    ignored illegal in inactive incoming incorrect info information insufficient internal invalid ip is issue it its
    known large late later learn length limit limited limits line lines list listed local locked login long lookup
    loop lost low mail mailbox mailboxes mailer mails malformed many match maximum may memory message messages
    method methods minute minutes missing moment more moved much must mx name need needed network never new no non
    not now number of off ok on one only open operation or out outbound over overload overloaded pass password per
    permanent permanently permitted phishing please policies policy possible postmaster problem problems processed
    processing prohibited protected protocol provide ptr queue queued quota rate rbl read ready reason receive
    received receiving recipient recipients record reduce refused reject rejected relay relaying remote reply
    reported reputation request requested required requires resource resources response restriction restrictions
    retry return returned reverse rset rule rules second seconds security see send sender senders sending sent
    sequence server servers service session setup should shutting signature size slow smtp smtputf8 so some soon
    space spam spamhaus spamming spf spool start started starttls status stop storage store stored submission submit
    successful successfully such support supported suspected suspended suspicious syntax system systems table take
    taken takes temporarily temporary text than that the their then there this throttled throttling through time
    timed timeout tls to too traffic transaction transfer transport trouble try trying turn unable unauthenticated
    unavailable unexpected unknown unreachable unrecognized unsolicited until up url us usage use used user username
    users using valid value verification verified verify version via violation virtual virus visit volume wait was
    we when which while will with within without words wrong you your zen
    """.split()  # noqa: SIM905
)
