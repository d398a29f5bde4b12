{{- define "nftproxy.labels" -}}
app.kubernetes.io/name: nftproxy
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "nftproxy.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "nftproxy.serviceAccount" -}}
{{ .Values.serviceAccount.name | default "nftproxy" }}
{{- end }}

{{- define "nftproxy.args" -}}
- --config=/var/lib/kube-proxy/config.conf
- --hostname-override=$(NODE_NAME)
{{- end }}

{{- define "nftproxy.env" -}}
- name: NODE_NAME
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
{{- end }}

{{- define "nftproxy.mounts" -}}
- name: config
  mountPath: /var/lib/kube-proxy
  readOnly: true
{{- end }}

{{- /* The port of an address like 0.0.0.0:10256, [::]:10256 or 0.0.0.0; or else the default. */ -}}
{{- define "nftproxy.port" -}}
{{- $found := regexFind "(^|[^:]|\\]):[0-9]+$" (.address | default "") -}}
{{- if $found }}{{ regexFind "[0-9]+$" $found }}{{ else }}{{ .default }}{{ end -}}
{{- end }}
